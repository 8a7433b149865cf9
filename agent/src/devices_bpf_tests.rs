//! Compiled device programs, run by a little interpreter, against a plain reading of the rules; and in the kernel.

use super::*;
use crate::syscall;

/// One question of the kernel.
#[derive(Clone, Copy, Debug)]
struct Question {
    kind: i32,
    access: i32,
    major: u32,
    minor: u32,
}

/// eBPF, as far as the compiler here goes.
fn run(program: &[u64], question: Question) -> u64 {
    let context = [(question.access << 16 | question.kind) as u32, question.major, question.minor];
    let mut registers = [0u64; 11];
    let mut at = 0usize;
    loop {
        let word = program[at];
        let (dst, src) = ((word >> 8 & 15) as usize, (word >> 12 & 15) as usize);
        let offset = (word >> 16) as u16 as i16;
        let immediate = i64::from((word >> 32) as u32 as i32) as u64;
        let jump = |taken: bool| if taken { usize::try_from(offset).unwrap() } else { 0 };
        at += 1 + match word as u8 {
            LDX_W => {
                assert_eq!(src, 1, "only the context is memory");
                registers[dst] = u64::from(context[offset as usize / 4]);
                0
            }
            MOV_K => {
                registers[dst] = immediate;
                0
            }
            MOV_X => {
                registers[dst] = registers[src];
                0
            }
            AND_K => {
                registers[dst] &= immediate;
                0
            }
            RSH_K => {
                registers[dst] >>= immediate;
                0
            }
            JA => jump(true),
            JSET_K => jump(registers[dst] & immediate != 0),
            JNE_K => jump(registers[dst] != immediate),
            EXIT => return registers[0],
            other => panic!("instruction {other:#x}"),
        };
    }
}

fn rule(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> LinuxDeviceCgroup {
    LinuxDeviceCgroup { allow, type_: kind.into(), major, minor, access: access.into() }
}

/// Each permission by the last rule that speaks of it.
fn reference(rules: &[LinuxDeviceCgroup], question: Question) -> bool {
    [(MKNOD, 'm'), (READ, 'r'), (WRITE, 'w')].into_iter().filter(|(bit, _)| question.access & bit != 0).all(
        |(_, letter)| {
            let speaks = |rule: &&LinuxDeviceCgroup| {
                let kind = match rule.type_.as_str() {
                    "b" => question.kind == DEVICE_BLOCK,
                    "c" => question.kind == DEVICE_CHAR,
                    _ => true,
                };
                let number = |wanted: i64, actual: u32| wanted < 0 || wanted == i64::from(actual);
                kind && number(rule.major, question.major)
                    && number(rule.minor, question.minor)
                    && rule.access.contains(letter)
            };
            rules.iter().rev().find(speaks).is_some_and(|rule| rule.allow)
        },
    )
}

#[test]
fn random_rules_mean_what_they_say() {
    let mut state = 0x0bad_cafe_dead_beefu64;
    let mut random = |limit: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % limit
    };
    let accesses = ["r", "w", "m", "rw", "rm", "wm", "rwm"];
    for _ in 0..500 {
        let rules: Vec<_> = (0..random(12))
            .map(|_| {
                let number = [-1, 1, 5, 136][random(4)];
                rule(random(2) == 0, ["a", "b", "c"][random(3)], number, [-1, 1, 2, 3][random(4)], accesses[random(7)])
            })
            .collect();
        let program = compile(&rules).unwrap();
        for _ in 0..200 {
            let question = Question {
                kind: 1 + random(2) as i32,
                access: 1 + random(7) as i32,
                major: [1, 5, 136, 7][random(4)],
                minor: random(5) as u32,
            };
            let actual = run(&program, question) == 1;
            assert_eq!(actual, reference(&rules, question), "{question:?} {rules:#?}");
        }
    }
}

/// What a container gets by default: nothing, but mknod, but /dev/null and friends.
fn usual() -> Vec<LinuxDeviceCgroup> {
    vec![
        rule(false, "a", -1, -1, "rwm"),
        rule(true, "c", -1, -1, "m"),
        rule(true, "b", -1, -1, "m"),
        rule(true, "c", 1, 3, "rwm"),
        rule(true, "c", 136, -1, "rwm"),
    ]
}

#[test]
fn the_usual_rules() {
    let program = compile(&usual()).unwrap();
    let on = |kind, access, major, minor| run(&program, Question { kind, access, major, minor }) == 1;
    assert!(on(DEVICE_CHAR, READ | WRITE, 1, 3) && on(DEVICE_CHAR, MKNOD, 9, 9) && on(DEVICE_CHAR, WRITE, 136, 7));
    assert!(!on(DEVICE_BLOCK, READ, 1, 3) && !on(DEVICE_CHAR, READ, 1, 4) && !on(DEVICE_CHAR, MKNOD | READ, 9, 9));
    let none = compile(&[]).unwrap();
    assert_eq!(run(&none, Question { kind: DEVICE_CHAR, access: READ, major: 1, minor: 3 }), 0);
}

#[test]
fn absent_numbers_and_empty_words_match_everything() {
    let program = compile(&[rule(true, "", 0, 0, ""), rule(false, "b", 0, 0, "w")]).unwrap();
    assert_eq!(run(&program, Question { kind: DEVICE_CHAR, access: EVERYTHING, major: 9, minor: 8 }), 1);
    assert_eq!(run(&program, Question { kind: DEVICE_BLOCK, access: EVERYTHING, major: 9, minor: 8 }), 0);
    assert_eq!(run(&program, Question { kind: DEVICE_BLOCK, access: READ, major: 9, minor: 8 }), 1);
    // 5:0 is a device of its own (/dev/tty).
    let program = compile(&[rule(true, "c", 5, 0, "rwm")]).unwrap();
    assert_eq!(run(&program, Question { kind: DEVICE_CHAR, access: READ, major: 5, minor: 1 }), 0);
}

#[test]
fn what_is_not_understood_is_named() {
    assert!(compile(&[rule(true, "x", 1, 1, "r")]).unwrap_err().message.contains("\"x\""));
    assert!(compile(&[rule(true, "c", 1, 1, "rx")]).unwrap_err().message.contains("\"rx\""));
    assert!(compile(&[rule(true, "c", 1 << 40, 1, "r")]).unwrap_err().message.contains("1099511627776"));
}

/// The kernel's verifier takes the programs, a cgroup obeys the newest one. Needs root and a cgroup v2 hierarchy.
#[test]
fn the_kernel_obeys() {
    let Some(root) = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].into_iter().find(|path| {
        crate::fs::exists(format!("{path}/cgroup.procs")) && crate::fs::exists(format!("{path}/cgroup.controllers"))
    }) else {
        eprintln!("skipped: no cgroup v2 hierarchy");
        return;
    };
    let path = format!("{root}/kata-agent-test-{}", crate::sys::getpid());
    if crate::fs::mkdir(&path, 0o755).is_err() {
        eprintln!("skipped: cannot make a cgroup");
        return;
    }
    let cgroup = crate::sys::open(&path, libc::O_RDONLY | libc::O_DIRECTORY, 0).unwrap();
    let before = attach(cgroup.raw(), &compile(&usual()).unwrap());
    if before.as_ref().is_err_and(|e| e.message.contains("operation not permitted") || e.message.contains("CONFIG")) {
        eprintln!("skipped: {}", before.unwrap_err());
        crate::fs::remove_dir(&path).unwrap();
        return;
    }
    before.unwrap();
    // The child of a test program with threads must not allocate.
    let opens = |device: &core::ffi::CStr| match crate::sys::fork(0, Some(cgroup.raw())).unwrap() {
        crate::sys::Fork::Child => {
            // SAFETY: a NUL-terminated path.
            let opened = unsafe { syscall!(libc::SYS_openat, libc::AT_FDCWD, device.as_ptr(), libc::O_RDONLY, 0) };
            crate::sys::exit(i32::from(opened == Err(Errno(libc::EPERM))))
        }
        crate::sys::Fork::Parent(pid) => crate::sys::wait_exit(pid) == Ok(0),
    };
    let first = (opens(c"/dev/null"), opens(c"/dev/zero"));
    let mut rules = usual();
    rules.push(rule(true, "c", 1, 5, "r"));
    rules.push(rule(false, "c", 1, 3, "r"));
    let replaced = attach(cgroup.raw(), &compile(&rules).unwrap());
    let second = (opens(c"/dev/null"), opens(c"/dev/zero"));
    let count = attached(cgroup.raw()).unwrap().len();
    crate::fs::remove_dir(&path).unwrap();
    replaced.unwrap();
    assert_eq!((first, second, count), ((true, false), (false, true), 1));
}
