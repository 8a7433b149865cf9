//! The codec and what is generated for it.

use super::agent::{
    CgroupStats, CreateContainerRequest, ExecProcessRequest, FSGroup, HugetlbStats, Interfaces, MemoryStats, Storage,
};
use super::agentext::WriteFileRequest;
use super::codec::*;
use super::oci::{ConsoleBox, Linux, LinuxSeccomp, LinuxSyscall, Process, Spec, User};
use super::types::Route;
use core::fmt;

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

fn check<M: Message + PartialEq + fmt::Debug>(message: &M, encoded: &str) {
    assert_eq!(message.to_vec(), hex(encoded));
    assert_eq!(&M::decode(&hex(encoded)).unwrap(), message);
}

// The bytes are what the host's codec makes of the same values; that one is tested against Google's.

#[test]
fn nested_messages_and_numbers() {
    let process = Process {
        terminal: true,
        console_size: Some(Box::new(ConsoleBox { height: 24, width: 80 })),
        user: Some(Box::new(User { additional_gids: vec![1, 300], ..Default::default() })),
        oom_score_adj: -5,
        ..Default::default()
    };
    let call = LinuxSyscall { names: vec!["dup".into()], errnoret: Some(0), ..Default::default() };
    let linux = Linux {
        seccomp: Some(Box::new(LinuxSeccomp { syscalls: vec![call], ..Default::default() })),
        ..Default::default()
    };
    let storage = Storage {
        driver: "blk".into(),
        options: vec!["ro".into(), "x".into()],
        fs_group: Some(Box::new(FSGroup { group_id: 300, ..Default::default() })),
        ..Default::default()
    };
    let spec = Spec {
        process: Some(Box::new(process)),
        annotations: [("a".into(), "1".into()), ("b".into(), String::new())].into(),
        linux: Some(Box::new(linux)),
        ..Default::default()
    };
    let request = CreateContainerRequest {
        container_id: "c1".into(),
        storages: vec![storage],
        oci: Some(Box::new(spec)),
        ..Default::default()
    };
    check(
        &request,
        "0a0263312a110a03626c6b2a02726f2a01783a0310ac023238121a08011204081810501a051a0301ac0258fbffffffffffffff\
         ff013a060a01611201313a050a01621200420b420922070a036475701800",
    );
}

#[test]
fn maps() {
    let memory = MemoryStats {
        use_hierarchy: true,
        stats: [("rss".into(), 1 << 63), ("z".into(), 0)].into(),
        ..Default::default()
    };
    let stats = CgroupStats {
        memory_stats: Some(Box::new(memory)),
        hugetlb_stats: [("2MB".into(), HugetlbStats { usage: 1, ..Default::default() })].into(),
        ..Default::default()
    };
    check(&stats, "121b280132100a03727373108080808080808080800132050a017a10002a090a03324d4212020801");
}

#[test]
fn optional_and_bytes() {
    let request = WriteFileRequest {
        path: b"\xff/a".to_vec(),
        offset: 1 << 40,
        data: b"d".to_vec(),
        truncate: true,
        mode: Some(0),
        mtime_ns: Some(-1),
        ..Default::default()
    };
    check(&request, "1203ff2f61188080808080202201642801300048ffffffffffffffffff01");
}

#[test]
fn unknown_fields_and_other_wire_types_are_skipped() {
    // A varint where a string belongs, a fixed64, a fixed32, a group; then two strings.
    let raw = hex("0801f10601020304050607089d0601020304a3060801a40612016b1a0178");
    let route = Route::decode(&raw).unwrap();
    assert_eq!((route.dest.as_str(), route.gateway.as_str(), route.device.as_str()), ("", "k", "x"));
}

#[test]
fn malformed() {
    for (raw, error) in [
        ("0a", DecodeError::Truncated),
        ("0a0561", DecodeError::Truncated),
        ("0affffffffffffffffff01", DecodeError::Truncated),
        ("2880", DecodeError::Truncated),
        ("288080808080808080808001", DecodeError::VarintTooLong),
        ("0a01ff", DecodeError::InvalidUtf8),
        ("0e", DecodeError::InvalidTag),
        ("0000", DecodeError::InvalidTag),
        ("ffffffffff01", DecodeError::InvalidTag),
        ("f10601", DecodeError::Truncated),
    ] {
        assert_eq!(Route::decode(&hex(raw)), Err(error), "{raw}");
    }
    // An inner length that reaches beyond its message.
    assert_eq!(Interfaces::decode(&hex("0a030a0561620a")), Err(DecodeError::Truncated));
}

#[test]
fn nesting_is_bounded() {
    let mut bomb = hex(&"9b06".repeat(MAX_DEPTH as usize));
    bomb.extend(hex(&"9c06".repeat(MAX_DEPTH as usize)));
    assert!(Route::decode(&bomb).is_ok());
    assert_eq!(Route::decode(&hex(&"9b06".repeat(1_000_000))), Err(DecodeError::TooDeep));
}

#[test]
fn a_singular_message_that_comes_twice_is_merged() {
    let part = |cwd: &str, arg: &str| ExecProcessRequest {
        process: Some(Box::new(Process { cwd: cwd.into(), args: vec![arg.into()], ..Default::default() })),
        ..Default::default()
    };
    let mut raw = part("/", "a").to_vec();
    part("/b", "c").encode(&mut raw);
    let process = ExecProcessRequest::decode(&raw).unwrap().process.unwrap();
    assert_eq!((process.cwd.as_str(), process.args), ("/b", vec!["a".to_string(), "c".to_string()]));
}

#[test]
fn packed_and_unpacked_numbers() {
    assert_eq!(User::decode(&hex("1a0301ac02")).unwrap().additional_gids, [1, 300]);
    assert_eq!(User::decode(&hex("180118ac02")).unwrap().additional_gids, [1, 300]);
    assert_eq!(User::decode(&hex("1a0201ac")), Err(DecodeError::Truncated));
}

#[test]
fn what_is_small_on_the_wire_stays_small_in_memory() {
    // Two megabytes of empty elements, two bytes each: a quarter of a gigabyte, were there no limit.
    let empty = |number: u8| [number << 3 | 2, 0].repeat(1 << 20);
    let nested = |inner: &[u8], numbers: &[u8]| {
        numbers.iter().fold(inner.to_vec(), |inside, number| {
            let mut out = vec![];
            put_bytes(&mut out, u32::from(*number), &inside);
            out
        })
    };
    // Messages, texts, maps, and numbers packed or not; at any depth.
    assert_eq!(CreateContainerRequest::decode(&empty(5)).err(), Some(DecodeError::TooBig));
    assert_eq!(ExecProcessRequest::decode(&nested(&empty(5), &[4])).err(), Some(DecodeError::TooBig));
    assert_eq!(Spec::decode(&empty(7)).err(), Some(DecodeError::TooBig));
    assert_eq!(CreateContainerRequest::decode(&nested(&empty(7), &[6])).err(), Some(DecodeError::TooBig));
    let groups = vec![1; (MAX_ELEMENT_BYTES >> 2) + 1];
    assert_eq!(Process::decode(&nested(&groups, &[3, 3])).err(), Some(DecodeError::TooBig));
    assert_eq!(User::decode(&[0x18, 1].repeat(groups.len())).err(), Some(DecodeError::TooBig));
    // A megabyte of environment is none of that, and neither is one message that comes again and again.
    let process = Process { env: vec!["x".repeat(100); 10_000], ..Default::default() };
    assert!(Process::decode(&process.to_vec()).is_ok());
    assert!(Spec::decode(&empty(2)).is_ok());
}
