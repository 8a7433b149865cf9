use super::*;
use crate::errors::code;
use crate::proto::oci::{LinuxNetwork, LinuxPids, LinuxThrottleDevice, LinuxWeightDevice};
use crate::test_support::TempDir;

fn planned(resources: &LinuxResources) -> Result<Vec<(String, String)>> {
    let read = |file: &str| match file {
        "memory.max" => Some("max\n".to_string()),
        "cpu.max" => Some("50000 100000\n".to_string()),
        _ => None,
    };
    Ok(plan(resources, &read)?.into_iter().map(|setting| (setting.file, setting.value)).collect())
}

fn pairs(expected: &[(&str, &str)]) -> Result<Vec<(String, String)>> {
    Ok(expected.iter().map(|(file, value)| ((*file).to_string(), (*value).to_string())).collect())
}

fn memory(memory: LinuxMemory) -> LinuxResources {
    LinuxResources { memory: Some(Box::new(memory)), ..Default::default() }
}

fn cpu(cpu: LinuxCPU) -> LinuxResources {
    LinuxResources { cpu: Some(Box::new(cpu)), ..Default::default() }
}

#[test]
fn memory_and_swap() {
    let with =
        |limit, swap, reservation| planned(&memory(LinuxMemory { limit, swap, reservation, ..Default::default() }));
    assert_eq!(with(0, 0, 0), pairs(&[]));
    assert_eq!(with(1 << 20, 0, 1 << 19), pairs(&[("memory.max", "1048576"), ("memory.low", "524288")]));
    assert_eq!(with(1 << 20, 3 << 20, 0), pairs(&[("memory.swap.max", "2097152"), ("memory.max", "1048576")]));
    assert_eq!(with(1 << 20, 1 << 20, 0), pairs(&[("memory.swap.max", "0"), ("memory.max", "1048576")]));
    assert_eq!(with(1 << 20, -1, 0), pairs(&[("memory.swap.max", "max"), ("memory.max", "1048576")]));
    assert_eq!(with(-1, 0, -1), pairs(&[("memory.swap.max", "max"), ("memory.max", "max"), ("memory.low", "max")]));
    assert_eq!(with(1 << 20, 1 << 19, 0).unwrap_err().code, code::INVALID_ARGUMENT);
    assert_eq!(with(0, 1 << 19, 0).unwrap_err().code, code::INVALID_ARGUMENT);
}

#[test]
fn what_v2_does_not_have_is_refused_by_name() {
    let refused = |resources: &LinuxResources| {
        let error = planned(resources).unwrap_err();
        assert_eq!(error.code, code::UNIMPLEMENTED);
        error.message
    };
    assert!(refused(&memory(LinuxMemory { kernel: 1, ..Default::default() })).contains("memory.kernel:"));
    assert!(refused(&memory(LinuxMemory { kernel_tcp: 1, ..Default::default() })).contains("kernelTCP"));
    assert!(refused(&memory(LinuxMemory { swappiness: 60, ..Default::default() })).contains("swappiness"));
    assert!(refused(&memory(LinuxMemory { disable_oom_killer: true, ..Default::default() })).contains("OOMKiller"));
    assert!(refused(&cpu(LinuxCPU { realtime_period: 1, ..Default::default() })).contains("realtime"));
    let network = Some(Box::new(LinuxNetwork { class_id: 1, ..Default::default() }));
    assert!(refused(&LinuxResources { network, ..Default::default() }).contains("network"));
    let io = Some(Box::new(LinuxBlockIO { leaf_weight: 10, ..Default::default() }));
    assert!(refused(&LinuxResources { block_io: io, ..Default::default() }).contains("leafWeight"));
}

#[test]
fn processors() {
    assert_eq!(planned(&cpu(LinuxCPU { shares: 1024, ..Default::default() })), pairs(&[("cpu.weight", "100")]));
    let quota = |quota, period| planned(&cpu(LinuxCPU { quota, period, ..Default::default() }));
    assert_eq!(quota(20_000, 50_000), pairs(&[("cpu.max", "20000 50000")]));
    assert_eq!(quota(20_000, 0), pairs(&[("cpu.max", "20000 100000")]));
    assert_eq!(quota(-1, 0), pairs(&[("cpu.max", "max 100000")]));
    assert_eq!(quota(0, 200_000), pairs(&[("cpu.max", "50000 200000")]), "keeps the quota that was set");
    assert_eq!(
        planned(&cpu(LinuxCPU { cpus: "0-1".into(), mems: "0".into(), ..Default::default() })),
        pairs(&[("cpuset.cpus", "0-1"), ("cpuset.mems", "0")])
    );
}

#[test]
fn weights_follow_the_formula_of_runc() {
    for shares in (3..4096).chain((4096..262_144).step_by(17)) {
        let shares: u64 = shares;
        let l = (shares as f64).log2();
        let expected = (10f64.powf((l * l + 125.0 * l) / 612.0 - 7.0 / 34.0) - 1e-9).ceil() as u64;
        assert_eq!(cpu_weight(shares), expected, "{shares}");
    }
    let known = [(1, 1), (2, 1), (1024, 100), (262_144, 10_000), (u64::MAX, 10_000)];
    assert!(known.iter().all(|(shares, weight)| cpu_weight(*shares) == *weight));
    assert_eq!((io_weight(10), io_weight(500), io_weight(1000)), (1, 4950, 10_000));
}

#[test]
fn processes_block_devices_and_huge_pages() {
    let pids = |limit| planned(&LinuxResources { pids: Some(Box::new(LinuxPids { limit })), ..Default::default() });
    assert_eq!((pids(100), pids(-1)), (pairs(&[("pids.max", "100")]), pairs(&[("pids.max", "max")])));
    assert_eq!(pids(0), pairs(&[]));
    let rate = |rate| vec![LinuxThrottleDevice { major: 254, minor: 0, rate }];
    let io = LinuxBlockIO {
        weight: 1000,
        weight_device: vec![LinuxWeightDevice { major: 254, minor: 16, weight: 10, leaf_weight: 0 }],
        throttle_read_bps_device: rate(1000),
        throttle_write_iops_device: rate(0),
        ..Default::default()
    };
    let resources = |io| LinuxResources { block_io: Some(Box::new(io)), ..Default::default() };
    assert_eq!(
        planned(&resources(io)),
        pairs(&[
            ("io.weight", "10000"),
            ("io.weight", "254:16 1"),
            ("io.max", "254:0 rbps=1000"),
            ("io.max", "254:0 wiops=max"),
        ])
    );
    let error = planned(&resources(LinuxBlockIO { weight: 5, ..Default::default() })).unwrap_err();
    assert!(error.message.contains("10..=1000"));
    let limit = |limit| LinuxHugepageLimit { pagesize: "2MB".into(), limit };
    let settings =
        plan(&LinuxResources { hugepage_limits: vec![limit(0), limit(4 << 20)], ..Default::default() }, &|_| None)
            .unwrap();
    let seen: Vec<_> = settings.iter().map(|s| (s.file.as_str(), s.value.as_str(), s.optional)).collect();
    assert_eq!(seen[..2], [("hugetlb.2MB.max", "0", true), ("hugetlb.2MB.rsvd.max", "0", true)]);
    assert_eq!(seen[2..], [("hugetlb.2MB.max", "4194304", false), ("hugetlb.2MB.rsvd.max", "4194304", true)]);
}

fn says(group: &TempDir, file: &str) -> String {
    fs::read_to_string(format!("{}/{file}", group.0)).unwrap().trim().to_string()
}

#[test]
fn what_was_written_before_a_failure_is_put_back() {
    let group = TempDir::new("limits");
    group.file("memory.max", "1048576\n");
    group.file("memory.low", "1000000\n");
    let memory = Some(Box::new(LinuxMemory { limit: 2 << 20, reservation: 2_000_000, ..Default::default() }));
    let pids = Some(Box::new(LinuxPids { limit: 7 }));
    let error = apply(&group.0, &LinuxResources { memory: memory.clone(), pids, ..Default::default() }).unwrap_err();
    assert!(error.message.contains("pids"), "{}", error.message);
    assert_eq!([says(&group, "memory.max"), says(&group, "memory.low")], ["1048576", "1000000"]);
    let undo = apply(&group.0, &LinuxResources { memory, ..Default::default() }).unwrap();
    assert_eq!([says(&group, "memory.max"), says(&group, "memory.low")], ["2097152", "2000000"]);
    undo.restore();
    assert_eq!([says(&group, "memory.max"), says(&group, "memory.low")], ["1048576", "1000000"]);
}

#[test]
fn a_limit_below_what_is_used_is_refused() {
    let group = TempDir::new("room");
    group.file("memory.max", "314572800\n");
    group.file("memory.high", "314572800\n");
    group.file("memory.current", "209715200\n");
    let to = |limit| apply(&group.0, &memory(LinuxMemory { limit, ..Default::default() }));
    let error = to(100 << 20).unwrap_err();
    assert_eq!(error.code, code::FAILED_PRECONDITION);
    assert!(error.message.ends_with("uses 200 MiB of memory and cannot be limited to 100 MiB"), "{}", error.message);
    assert_eq!([says(&group, "memory.max"), says(&group, "memory.high")], ["314572800", "314572800"]);
    to(200 << 20).unwrap();
    assert_eq!(says(&group, "memory.max"), "209715200");
}

#[test]
fn each_kind_of_file_is_undone_in_its_own_way() {
    let undone = |file: &str, value: &str, text: &str| {
        let (file, value) = (file.to_string(), value.to_string());
        undoing(&Setting { controller: "", file, value, field: "", optional: false }, text)
    };
    assert_eq!(undone("cpu.max", "5 10", "max 100000\n"), "max 100000");
    assert_eq!(undone("io.weight", "200", "default 100\n8:0 50\n"), "default 100");
    assert_eq!(undone("io.weight", "8:0 200", "default 100\n8:0 50\n"), "8:0 50");
    assert_eq!(undone("io.weight", "8:16 200", "default 100\n8:0 50\n"), "8:16 default");
    assert_eq!(undone("io.max", "8:0 rbps=5", ""), "8:0 rbps=max wbps=max riops=max wiops=max");
    assert_eq!(undone("io.max", "8:0 rbps=5", "8:0 rbps=9 wbps=max\n"), "8:0 rbps=9 wbps=max");
}
