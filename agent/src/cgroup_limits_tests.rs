use super::*;
use crate::errors::code;
use crate::proto::oci::{LinuxNetwork, LinuxPids, LinuxThrottleDevice, LinuxWeightDevice};

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
