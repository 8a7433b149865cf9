//! The compiled program, run by a little interpreter, against a plain reading of the profile.

use super::*;

#[derive(Clone, Copy, PartialEq)]
enum Abi {
    Native,
    X86,
    X32,
}

fn number(abi: Abi, name: &str) -> Option<u32> {
    let found = numbers(name);
    match abi {
        Abi::Native => found.native,
        Abi::X86 => found.x86,
        Abi::X32 => found.x32,
    }
}

/// What a program sees of a call.
struct Call {
    nr: u32,
    arch: u32,
    args: [u64; 6],
}

/// Classic BPF as the kernel runs it over struct seccomp_data.
fn run(program: &[sock_filter], call: &Call) -> u32 {
    let load = |offset: u32| match offset {
        DATA_NR => call.nr,
        DATA_ARCH => call.arch,
        offset => {
            let word = (offset - DATA_ARGS) / 4;
            let arg = call.args[word as usize / 2];
            if word % 2 == 0 {
                arg as u32
            } else {
                (arg >> 32) as u32
            }
        }
    };
    let (mut at, mut accumulator) = (0usize, 0u32);
    loop {
        let instruction = &program[at];
        let k = instruction.k;
        let branch = |taken: bool| usize::from(if taken { instruction.jt } else { instruction.jf });
        at += 1 + match instruction.code {
            LD_ABS => {
                accumulator = load(k);
                0
            }
            AND_K => {
                accumulator &= k;
                0
            }
            JA => k as usize,
            JEQ_K => branch(accumulator == k),
            JGT_K => branch(accumulator > k),
            JGE_K => branch(accumulator >= k),
            RET_K => return k,
            other => panic!("instruction {other:#x}"),
        };
    }
}

fn holds(arg: &LinuxSeccompArg, args: &[u64; 6], width: u64) -> bool {
    let (actual, value) = (args[arg.index as usize] & width, arg.value & width);
    match arg.op.as_str() {
        "SCMP_CMP_NE" => actual != value,
        "SCMP_CMP_LT" => actual < value,
        "SCMP_CMP_LE" => actual <= value,
        "SCMP_CMP_EQ" => actual == value,
        "SCMP_CMP_GE" => actual >= value,
        "SCMP_CMP_GT" => actual > value,
        "SCMP_CMP_MASKED_EQ" => actual & value == arg.value_two & width,
        other => panic!("{other}"),
    }
}

/// The documented meaning, without any cleverness. Multiplexed calls are tested on their own.
fn reference(profile: &LinuxSeccomp, call: &Call) -> u32 {
    let default = action(&profile.default_action, profile.default_errno_ret).unwrap();
    let has = |name: &str| profile.architectures.iter().any(|a| a == name);
    let (abi, nr) = match call.arch {
        AUDIT_ARCH_NATIVE if call.nr >= X32_BIT && has("SCMP_ARCH_X32") => (Abi::X32, call.nr - X32_BIT),
        AUDIT_ARCH_NATIVE => (Abi::Native, call.nr),
        AUDIT_ARCH_I386 if has("SCMP_ARCH_X86") => (Abi::X86, call.nr),
        _ => return RET_KILL_THREAD,
    };
    let permissive = ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE"].contains(&profile.default_action.as_str());
    if abi == Abi::Native && nr >= X32_BIT && nr != u32::MAX && permissive {
        return RET_KILL_THREAD;
    }
    let highest = profile.syscalls.iter().flat_map(|s| &s.names).filter_map(|name| number(abi, name)).max();
    if !permissive && highest.is_some_and(|highest| nr > highest) {
        return RET_ERRNO | 38;
    }
    let rules: Vec<(&LinuxSyscall, u32)> = profile
        .syscalls
        .iter()
        .filter(|s| s.names.iter().any(|name| number(abi, name) == Some(nr)))
        .map(|s| (s, action(&s.action, s.errnoret).unwrap()))
        .filter(|(_, action)| *action != default)
        .collect();
    let width = if abi == Abi::Native { u64::MAX } else { u64::from(u32::MAX) };
    let unconditional = rules.iter().find(|(s, _)| s.args.is_empty());
    let matching = rules.iter().find(|(s, _)| {
        let distinct: BTreeSet<u64> = s.args.iter().map(|arg| arg.index).collect();
        let mut outcomes = s.args.iter().map(|arg| holds(arg, &call.args, width));
        if distinct.len() < s.args.len() {
            outcomes.any(|held| held)
        } else {
            outcomes.all(|held| held)
        }
    });
    unconditional.or(matching).map_or(default, |(_, action)| *action)
}

/// xorshift64*: the same profiles in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn pick<'a>(&mut self, items: &[&'a str]) -> &'a str {
        items[self.below(items.len())]
    }

    /// Values that meet each other often, in both words.
    fn value(&mut self) -> u64 {
        let word = |r: &mut Self| [0, 1, 2, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, 0xffff_ffff][r.below(7)];
        let low = word(self);
        low | if self.below(2) == 0 { 0 } else { word(self) << 32 }
    }
}

const ACTIONS: &[&str] = &[
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_LOG",
    "SCMP_ACT_TRACE",
];
const OPERATORS: &[&str] =
    &["SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"];
// None of i386's multiplexed calls: `reference` does not know them.
const NAMES: &[&str] = &[
    "read",
    "write",
    "openat",
    "openat2",
    "clone",
    "clone3",
    "ioctl",
    "personality",
    "mseal",
    "futex",
    "mmap2",
    "writev",
    "execve",
    "io_setup",
    "no_such_call",
    "chown32",
    "close",
    "fstat",
    "fork",
    "vfork",
    "exit_group",
    "bpf",
    "ptrace",
    "time",
    "stat",
    "mount_setattr",
    "rt_sigaction",
    "modify_ldt",
    "uselib",
    "preadv2",
];

fn random_profile(random: &mut Random) -> LinuxSeccomp {
    let mut syscalls = Vec::new();
    for _ in 0..random.below(40) {
        let action = random.pick(ACTIONS).to_string();
        let errnoret =
            (["SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"].contains(&action.as_str()) && random.below(2) == 0).then_some(38);
        let args = (0..random.below(4))
            .map(|_| LinuxSeccompArg {
                index: random.below(6) as u64,
                value: random.value(),
                value_two: random.value(),
                op: random.pick(OPERATORS).to_string(),
            })
            .collect();
        let names = (0..=random.below(4)).map(|_| random.pick(NAMES).to_string()).collect();
        syscalls.push(LinuxSyscall { names, action, errnoret, args });
    }
    let architectures = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
        .iter()
        .filter(|_| random.below(2) == 0)
        .map(ToString::to_string)
        .collect();
    let default_action = random.pick(ACTIONS).to_string();
    let takes_errno = ["SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"].contains(&default_action.as_str());
    let default_errno_ret = if takes_errno { [None, Some(1), Some(6), Some(38)][random.below(4)] } else { None };
    LinuxSeccomp { default_action, architectures, flags: vec![], syscalls, default_errno_ret }
}

fn check(profile: &LinuxSeccomp, call: &Call) {
    let program = compile(profile).unwrap();
    let (actual, expected) = (run(&program, call), reference(profile, call));
    assert_eq!(
        actual, expected,
        "nr {:#x} arch {:#x} args {:x?}\n{profile:#?}\n{program:?}",
        call.nr, call.arch, call.args
    );
}

#[cfg(target_arch = "x86_64")]
#[test]
fn random_profiles_mean_what_they_say() {
    let mut random = Random(0x1234_5678_9abc_def1);
    for _ in 0..300 {
        let profile = random_profile(&mut random);
        let program = compile(&profile).unwrap();
        for _ in 0..100 {
            let (arch, base, abi) = match random.below(8) {
                0 => (0x1234_5678, 0, Abi::Native),
                1 | 2 => (AUDIT_ARCH_I386, 0, Abi::X86),
                3 => (AUDIT_ARCH_NATIVE, X32_BIT, Abi::X32),
                _ => (AUDIT_ARCH_NATIVE, 0, Abi::Native),
            };
            let nr = match random.below(10) {
                0 => random.next() as u32,
                1 => u32::MAX,
                2 => random.below(600) as u32,
                _ => number(abi, random.pick(NAMES)).unwrap_or(0) + base,
            };
            let mut args = [0; 6];
            for arg in &mut args {
                *arg = random.value();
            }
            let call = Call { nr, arch, args };
            let (actual, expected) = (run(&program, &call), reference(&profile, &call));
            assert_eq!(actual, expected, "nr {nr:#x} arch {arch:#x} args {args:x?}\n{profile:#?}");
        }
    }
}

fn rule(names: &[&str], action: &str, args: &[(u64, &str, u64, u64)]) -> LinuxSyscall {
    LinuxSyscall {
        names: names.iter().map(ToString::to_string).collect(),
        action: action.into(),
        errnoret: None,
        args: args
            .iter()
            .map(|(index, op, value, value_two)| LinuxSeccompArg {
                index: *index,
                value: *value,
                value_two: *value_two,
                op: format!("SCMP_CMP_{op}"),
            })
            .collect(),
    }
}

fn profile(default: &str, syscalls: Vec<LinuxSyscall>) -> LinuxSeccomp {
    LinuxSeccomp {
        default_action: default.into(),
        architectures: ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"].map(Into::into).into(),
        flags: vec![],
        syscalls,
        default_errno_ret: None,
    }
}

fn native(name: &str, args: [u64; 6]) -> Call {
    Call { nr: number(Abi::Native, name).unwrap(), arch: AUDIT_ARCH_NATIVE, args }
}

#[test]
fn arguments_of_one_rule_are_all_needed_and_rules_are_alternatives() {
    let subject = profile(
        "SCMP_ACT_ERRNO",
        vec![
            rule(&["personality"], "SCMP_ACT_ALLOW", &[(0, "EQ", 0, 0)]),
            rule(&["personality"], "SCMP_ACT_ALLOW", &[(0, "EQ", 8, 0)]),
            rule(&["clone"], "SCMP_ACT_ALLOW", &[(0, "MASKED_EQ", 0x7e02_0000, 0), (1, "NE", 5, 0)]),
            rule(&["openat2"], "SCMP_ACT_KILL", &[]),
        ],
    );
    let program = compile(&subject).unwrap();
    let on = |name, a, b| run(&program, &native(name, [a, b, 0, 0, 0, 0]));
    assert_eq!(on("personality", 0, 0), RET_ALLOW);
    assert_eq!(on("personality", 8, 0), RET_ALLOW);
    assert_eq!(on("personality", 1, 0), RET_ERRNO | 1);
    assert_eq!(on("personality", 8 << 32, 0), RET_ERRNO | 1);
    assert_eq!(on("clone", 0x1200_0011, 4), RET_ERRNO | 1);
    assert_eq!(on("clone", 0x0120_0011, 4), RET_ALLOW);
    assert_eq!(on("clone", 0x0120_0011, 5), RET_ERRNO | 1);
    assert_eq!(on("openat2", 0, 0), RET_KILL_THREAD);
    assert_eq!(on("fchmodat2", 0, 0), RET_ERRNO | 38, "newer than everything in the profile");
}

#[test]
fn the_default_action_has_an_error_number_of_its_own() {
    let mut refused = rule(&["read"], "SCMP_ACT_ERRNO", &[]);
    refused.errnoret = Some(libc::ENXIO as u32);
    let calls = vec![rule(&["openat2"], "SCMP_ACT_ALLOW", &[]), rule(&["write"], "SCMP_ACT_ERRNO", &[]), refused];
    let mut subject = profile("SCMP_ACT_ERRNO", calls);
    for (number, expected) in [(None, 1), (Some(6), 6), (Some(38), 38), (Some(0), 0), (Some(4095), 4095)] {
        subject.default_errno_ret = number;
        let program = compile(&subject).unwrap();
        let on = |name| run(&program, &native(name, [0; 6]));
        assert_eq!(on("clone3"), RET_ERRNO | expected);
        assert_eq!((on("write"), on("read")), (RET_ERRNO | 1, RET_ERRNO | 6), "the rules keep theirs");
        assert_eq!(on("fchmodat2"), RET_ERRNO | 38, "newer than everything in the profile");
    }
    for (action, number, word) in [("ERRNO", 4096, "4096"), ("ALLOW", 38, "SCMP_ACT_ALLOW takes no errnoRet")] {
        subject = profile(&format!("SCMP_ACT_{action}"), vec![]);
        subject.default_errno_ret = Some(number);
        let error = compile(&subject).unwrap_err().message;
        assert!(error.contains(word), "{error}");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn i386_sockets_are_reached_by_number_too() {
    let subject = profile("SCMP_ACT_ERRNO", vec![rule(&["socket", "accept", "shmget"], "SCMP_ACT_ALLOW", &[])]);
    let program = compile(&subject).unwrap();
    let on = |nr, first| run(&program, &Call { nr, arch: AUDIT_ARCH_I386, args: [first, 0, 0, 0, 0, 0] });
    assert_eq!(on(102, 1), RET_ALLOW);
    assert_eq!(on(102, 5), RET_ALLOW);
    assert_eq!(on(102, 3), RET_ERRNO | 1);
    assert_eq!(on(117, 23), RET_ALLOW);
    assert_eq!(on(117, 24), RET_ERRNO | 1);
    assert_eq!(on(359, 0), RET_ALLOW);
    assert_eq!(on(361, 0), RET_ERRNO | 1);
}

#[test]
fn two_conditions_on_one_argument_are_alternatives() {
    let conditions = [(0, "EQ", 100, 0), (1, "EQ", 7, 0), (0, "EQ", 9001, 0)];
    let subject = profile("SCMP_ACT_ERRNO", vec![rule(&["socket"], "SCMP_ACT_ALLOW", &conditions)]);
    let program = compile(&subject).unwrap();
    let on = |first, second| run(&program, &native("socket", [first, second, 0, 0, 0, 0]));
    for (first, second, expected) in
        [(100, 0, RET_ALLOW), (9001, 0, RET_ALLOW), (0, 7, RET_ALLOW), (0, 0, RET_ERRNO | 1), (7, 100, RET_ERRNO | 1)]
    {
        assert_eq!(on(first, second), expected, "{first} {second}");
    }
}

#[test]
fn long_programs_use_long_jumps() {
    // 512 rules for one call put more than 255 instructions between the branches of the tree.
    let values = (0..512).map(|value| rule(&["ioctl"], "SCMP_ACT_ALLOW", &[(1, "EQ", value, 0)]));
    let mut subject = profile("SCMP_ACT_ERRNO", values.collect());
    subject.architectures.clear();
    subject.syscalls.push(rule(&["openat2"], "SCMP_ACT_ALLOW", &[]));
    let program = compile(&subject).unwrap();
    assert!(program.iter().any(|i| i.code == JA && i.k > 255));
    for value in [0, 100, 511, 512] {
        check(&subject, &native("ioctl", [0, value, 0, 0, 0, 0]));
    }
    check(&subject, &native("openat2", [0; 6]));
    check(&subject, &native("read", [0; 6]));
    subject.syscalls.extend((512..1024).map(|value| rule(&["ioctl"], "SCMP_ACT_ALLOW", &[(1, "EQ", value, 0)])));
    let error = compile(&subject).unwrap_err();
    assert!(error.message.contains("instructions"), "{error}");
}

#[test]
fn what_is_not_understood_is_named() {
    let fails = |subject: &LinuxSeccomp| compile(subject).unwrap_err().message;
    assert!(fails(&profile("SCMP_ACT_MAYBE", vec![])).contains("SCMP_ACT_MAYBE"));
    assert!(fails(&profile("SCMP_ACT_NOTIFY", vec![])).contains("SCMP_ACT_NOTIFY"));
    assert!(fails(&profile("SCMP_ACT_ALLOW", vec![rule(&["read"], "x", &[])])).contains("\"x\""));
    assert!(fails(&profile("SCMP_ACT_ALLOW", vec![rule(&["read"], "SCMP_ACT_KILL", &[(6, "EQ", 0, 0)])])).contains('6'));
    assert!(
        fails(&profile("SCMP_ACT_ALLOW", vec![rule(&["read"], "SCMP_ACT_KILL", &[(0, "IS", 0, 0)])])).contains("IS")
    );
    let mut subject = profile("SCMP_ACT_ALLOW", vec![]);
    subject.architectures.push("SCMP_ARCH_Z80".into());
    assert!(fails(&subject).contains("SCMP_ARCH_Z80"));
    let mut with_errno = rule(&["read"], "SCMP_ACT_ERRNO", &[]);
    with_errno.errnoret = Some(4096);
    assert!(fails(&profile("SCMP_ACT_ALLOW", vec![with_errno])).contains("4096"));
    assert_eq!(flags(&["SECCOMP_FILTER_FLAG_LOG".into(), "SECCOMP_FILTER_FLAG_SPEC_ALLOW".into()]), Ok(6));
    assert!(flags(&["NEW".into()]).is_err());
}

/// In a child: the kernel takes the program and obeys it.
#[test]
fn the_kernel_obeys_an_installed_filter() {
    let mut refuse = rule(&["getppid"], "SCMP_ACT_ERRNO", &[]);
    refuse.errnoret = Some(libc::EXDEV as u32);
    let program = compile(&profile("SCMP_ACT_ALLOW", vec![refuse])).unwrap();
    match sys::fork(0, None).unwrap() {
        sys::Fork::Child => {
            let installed = sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).is_ok() && install(&program, 0).is_ok();
            // SAFETY: getppid has no arguments.
            let refused = unsafe { syscall!(libc::SYS_getppid) } == Err(sys::Errno(libc::EXDEV));
            sys::exit(i32::from(!installed) * 2 + i32::from(!refused));
        }
        sys::Fork::Parent(pid) => assert_eq!(sys::wait_exit(pid), Ok(0)),
    }
}
