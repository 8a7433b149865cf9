//! What only a machine of its own can show: controllers, disks by address, clock, entropy, processors.
//!
//! Runs in the virtual machine that `tests/vm/test_agent_modules.py` builds (its devices are described there), as
//! root, one test at a time, right after boot. Nothing here is run by a plain `cargo test`.

use kata_agent::cgroup::{self, Cgroup};
use kata_agent::errors::code;
use kata_agent::proto::agent::{FSGroup, Routes, Storage};
use kata_agent::proto::oci::{
    LinuxBlockIO, LinuxCPU, LinuxDeviceCgroup, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxResources,
    LinuxThrottleDevice,
};
use kata_agent::proto::types::{IPAddress, Interface, Route};
use kata_agent::sys::{self, Errno};
use kata_agent::{devices, devices_bpf, fs, guest, netlink, process_list, routes, storage};

const MIB: i64 = 1 << 20;

/// A group below the agent's own place, gone when dropped.
struct Group(Cgroup);

impl Group {
    fn new(name: &str, resources: &LinuxResources) -> Group {
        cgroup::setup_root().unwrap();
        Group(Cgroup::create(name, Some(resources)).unwrap())
    }

    fn read(&self, file: &str) -> String {
        let text = fs::read_to_string(format!("{}/{file}", self.0.path()));
        text.unwrap_or_else(|e| panic!("{file}: {e}")).trim().to_string()
    }

    /// Runs `child` in the group; its exit code.
    fn run(&self, child: impl FnOnce() -> i32) -> i32 {
        let directory = self.0.open().unwrap();
        match sys::fork(0, Some(directory.raw())).unwrap() {
            sys::Fork::Child => sys::exit(child()),
            sys::Fork::Parent(pid) => sys::wait_exit(pid).unwrap(),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.0.kill_all().unwrap();
        self.0.remove().unwrap();
    }
}

fn memory(limit: i64, swap: i64) -> LinuxResources {
    LinuxResources { memory: Some(Box::new(LinuxMemory { limit, swap, ..Default::default() })), ..Default::default() }
}

/// Writes to so many bytes of fresh memory.
fn touch(bytes: usize) {
    let mut block: Vec<u8> = Vec::with_capacity(bytes);
    for at in (0..bytes).step_by(4096) {
        // SAFETY: inside the capacity; the bytes are never read.
        unsafe { block.as_mut_ptr().add(at).write_volatile(1) };
    }
}

fn has_controller(name: &str) -> bool {
    cgroup::setup_root().unwrap();
    let known = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap();
    let there = known.split_whitespace().any(|controller| controller == name);
    if !there {
        eprintln!("skipped: this kernel has no {name} controller");
    }
    there
}

#[test]
fn every_limit_reaches_its_file() {
    let mut resources = memory(64 * MIB, 96 * MIB);
    resources.memory.as_mut().unwrap().reservation = 16 * MIB;
    resources.cpu = Some(Box::new(LinuxCPU {
        shares: 2048,
        quota: 25_000,
        period: 50_000,
        cpus: "0".into(),
        mems: "0".into(),
        ..Default::default()
    }));
    resources.pids = Some(Box::new(LinuxPids { limit: 77 }));
    let group = Group::new("limits", &resources);
    assert_eq!(group.read("memory.max"), (64 * MIB).to_string());
    assert_eq!(group.read("memory.low"), (16 * MIB).to_string());
    if fs::exists(format!("{}/memory.swap.max", group.0.path())) {
        assert_eq!(group.read("memory.swap.max"), (32 * MIB).to_string());
    }
    assert_eq!((group.read("cpu.weight").as_str(), group.read("cpu.max").as_str()), ("174", "25000 50000"));
    assert_eq!((group.read("cpuset.cpus").as_str(), group.read("cpuset.mems").as_str()), ("0", "0"));
    assert_eq!(group.read("pids.max"), "77");
    // An update changes what it names.
    let cpu = Some(Box::new(LinuxCPU { quota: -1, ..Default::default() }));
    let pids = Some(Box::new(LinuxPids { limit: -1 }));
    group.0.apply(&LinuxResources { cpu, pids, ..Default::default() }).unwrap();
    assert_eq!((group.read("cpu.max").as_str(), group.read("pids.max").as_str()), ("max 100000", "max"));
    assert_eq!(group.read("memory.max"), (64 * MIB).to_string());
    let wrong = LinuxResources {
        cpu: Some(Box::new(LinuxCPU { cpus: "nonsense".into(), ..Default::default() })),
        ..Default::default()
    };
    let error = Cgroup::create("wrong", Some(&wrong)).unwrap_err();
    assert!(error.message.contains("cpu.cpus") && error.message.contains("nonsense"), "{error}");
    assert!(!fs::exists("/sys/fs/cgroup/kata/wrong"), "a failed creation leaves nothing");
}

#[test]
fn memory_beyond_the_limit_is_a_counted_kill() {
    let group = Group::new("oom", &memory(24 * MIB, 24 * MIB));
    let watch = group.0.watch_oom().unwrap();
    assert_eq!(group.0.oom_kill_count(), Ok(0));
    assert_eq!(
        group.run(|| {
            touch(8 << 20);
            0
        }),
        0
    );
    assert_eq!(sys::poll_one(watch.raw(), libc::POLLIN, 0), Ok(0));
    assert_eq!(
        group.run(|| {
            touch(128 << 20);
            0
        }),
        137
    );
    assert_eq!(group.0.oom_kill_count(), Ok(1));
    assert_eq!(sys::poll_one(watch.raw(), libc::POLLIN, 1000), Ok(libc::POLLIN));
    let stats = group.0.stats().unwrap();
    let usage = stats.memory_stats.unwrap();
    let total = usage.usage.unwrap();
    assert!(total.limit == 24 << 20 && total.failcnt > 0 && total.max_usage > 8 << 20, "{total:?}");
    assert!(usage.stats.contains_key("inactive_file") && usage.use_hierarchy);
    assert!(stats.cpu_stats.unwrap().cpu_usage.unwrap().total_usage > 0);
    assert_eq!(stats.pids_stats.unwrap().limit, u64::MAX);
}

#[test]
fn processes_are_counted_and_listed() {
    let pids = Some(Box::new(LinuxPids { limit: 2 }));
    let group = Group::new("pids", &LinuxResources { pids, ..Default::default() });
    let code = group.run(|| {
        // This process and one child are two.
        let first = sys::fork(0, None);
        if let Ok(sys::Fork::Child) = first {
            loop {
                sys::sleep_ms(1000);
            }
        }
        i32::from(matches!(sys::fork(0, None), Err(Errno(libc::EAGAIN)))) + 40
    });
    assert_eq!(code, 41);
    let pids = group.0.pids().unwrap();
    let listed = process_list::list(&pids).unwrap();
    assert_eq!(listed.len(), 1);
    assert!(listed[0].pid as i32 == pids[0] && listed[0].uid == 0 && !listed[0].command[0].is_empty());
    group.0.freeze().unwrap();
    assert_eq!(group.0.stats().unwrap().pids_stats.unwrap().current, 1);
    group.0.kill_all().unwrap();
    while !group.0.is_empty().unwrap() {
        sys::sleep_ms(1);
    }
}

#[test]
fn disk_traffic_is_limited_and_counted() {
    if !has_controller("io") {
        return;
    }
    let node = devices::find_block_by_bus("05").unwrap();
    let number = sys::stat(&node).unwrap().st_rdev;
    let (major, minor) = (i64::from(libc::major(number)), i64::from(libc::minor(number)));
    let device = |rate| vec![LinuxThrottleDevice { major, minor, rate }];
    let mut limits = LinuxBlockIO { throttle_read_bps_device: device(1 << 30), ..Default::default() };
    limits.throttle_write_iops_device = device(500);
    let block_io = Some(Box::new(limits));
    let group = Group::new("io", &LinuxResources { block_io, ..Default::default() });
    assert_eq!(group.read("io.max"), format!("{major}:{minor} rbps=1073741824 wbps=max riops=max wiops=500"));
    let code = group.run(|| {
        let file = sys::open(&node, libc::O_RDONLY, 0).unwrap();
        // The cache must not answer.
        // SAFETY: no memory is involved.
        let _ = unsafe { kata_agent::syscall!(libc::SYS_fadvise64, file.raw(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        let mut block = vec![0; 1 << 16];
        i32::from(sys::pread(file.raw(), &mut block, 1 << 20) != Ok(1 << 16))
    });
    assert_eq!(code, 0);
    let entries = group.0.stats().unwrap().blkio_stats.unwrap().io_service_bytes_recursive;
    let read = entries.iter().find(|e| (e.major, e.minor) == (major as u64, minor as u64) && e.op == "Read");
    assert!(read.is_some_and(|entry| entry.value >= 1 << 16), "{entries:?}");
    let weight = LinuxResources {
        block_io: Some(Box::new(LinuxBlockIO { weight: 500, ..Default::default() })),
        ..Default::default()
    };
    match group.0.apply(&weight) {
        Ok(_) => assert!(["io.weight", "io.bfq.weight"].iter().any(|file| {
            fs::read_to_string(format!("{}/{file}", group.0.path())).is_ok_and(|text| text.starts_with("default "))
        })),
        // Neither the scheduler nor the cost model is in this kernel.
        Err(e) => assert!(e.code == code::UNIMPLEMENTED && e.message.contains("\"io\""), "{e}"),
    }
}

#[test]
fn huge_pages_are_reserved_limited_and_counted() {
    let mut wanted = mount("ephemeral", "hugetlbfs", "hugetlbfs", "pagesize=2M,size=4M", "/tmp/huge");
    if !fs::exists("/sys/kernel/mm/hugepages/hugepages-2048kB") {
        return eprintln!("skipped: this kernel has no huge pages");
    }
    storage::mount_storage(&wanted).unwrap();
    assert_eq!(fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages").unwrap().trim(), "2");
    storage::unmount("/tmp/huge").unwrap();
    wanted.options = vec!["pagesize=2M".into(), "size=64G".into()];
    let error = storage::mount_storage(&wanted).unwrap_err();
    assert!(error.code == code::RESOURCE_EXHAUSTED && error.message.contains("32768"), "{error}");
    assert_eq!(fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages").unwrap().trim(), "2");
    assert!(!mounts().contains("/tmp/huge"));
    if !has_controller("hugetlb") {
        return;
    }
    let limit = |limit| LinuxHugepageLimit { pagesize: "2MB".into(), limit };
    let group = Group::new("huge", &LinuxResources { hugepage_limits: vec![limit(2 << 20)], ..Default::default() });
    assert_eq!(group.read("hugetlb.2MB.max"), (2 * MIB).to_string());
    assert_eq!(group.0.stats().unwrap().hugetlb_stats["2MB"].usage, 0);
}

#[test]
fn device_rules_are_kept() {
    let rule = |allow, major, minor| LinuxDeviceCgroup { allow, type_: "c".into(), major, minor, access: "rwm".into() };
    let group = Group::new("devices", &LinuxResources::default());
    let directory = group.0.open().unwrap();
    devices_bpf::attach(directory.raw(), &devices_bpf::compile(&[rule(true, 1, 3)]).unwrap()).unwrap();
    let opens = |path: &'static str| i32::from(sys::open(path, libc::O_RDONLY, 0) == Err(Errno(libc::EPERM)));
    assert_eq!((group.run(|| opens("/dev/null")), group.run(|| opens("/dev/zero"))), (0, 1));
    // A program that is in the kernel is loaded no second time; other rules are another one.
    let mut kept = devices_bpf::Kept::default();
    let mut attach = |minor| {
        let program = kept.load(devices_bpf::compile(&[rule(true, 1, minor)]).unwrap()).unwrap();
        devices_bpf::attach_loaded(directory.raw(), program).unwrap();
        (program_id(program), group.run(|| opens("/dev/null")), group.run(|| opens("/dev/zero")))
    };
    let (first, again, other) = (attach(5), attach(5), attach(3));
    assert_eq!(first, again);
    assert_eq!((first.1, first.2, other.0 == first.0), (1, 0, false));
    assert_eq!((other.1, other.2), (0, 1));
}

/// The kernel's number of a BPF program, by its descriptor.
fn program_id(program: i32) -> String {
    let about = fs::read_to_string(format!("/proc/self/fdinfo/{program}")).unwrap();
    about.lines().find(|line| line.starts_with("prog_id:")).unwrap().to_string()
}

fn mount(driver: &str, source: &str, fstype: &str, options: &str, point: &str) -> Storage {
    Storage {
        driver: driver.into(),
        source: source.into(),
        fstype: fstype.into(),
        options: options.split(',').filter(|option| !option.is_empty()).map(Into::into).collect(),
        mount_point: point.into(),
        ..Default::default()
    }
}

fn mounts() -> String {
    fs::read_to_string("/proc/mounts").unwrap()
}

/// The test disks hold a file system with one file, `name`, that holds the disk's name.
fn check_disk(storage: &Storage, name: &str) {
    storage::mount_storage(storage).unwrap();
    let found = fs::read_to_string(format!("{}/name", storage.mount_point)).unwrap();
    assert_eq!(found.trim(), name);
    storage::unmount(&storage.mount_point).unwrap();
}

#[test]
fn disks_are_found_by_address_and_serial() {
    check_disk(&mount("blk", "05", "ext4", "ro", "/tmp/a"), "root-bus");
    check_disk(&mount("blk", "10/03", "ext4", "ro,nodev", "/tmp/b"), "behind-bridge");
    check_disk(&mount("blk", "serial:behind-bridge", "ext4", "ro", "/tmp/c"), "behind-bridge");
    let node = devices::find_block_by_bus("10/03").unwrap();
    assert_eq!(devices::find_block_by_serial("behind-bridge"), Ok(node.clone()));
    check_disk(&mount("mmioblk", &node, "ext4", "ro", "/tmp/d"), "behind-bridge");
    let mut owned = mount("blk", "10/03", "ext4", "", "/tmp/e");
    owned.fs_group = Some(Box::new(FSGroup { group_id: 4321, group_change_policy: 0 }));
    storage::mount_storage(&owned).unwrap();
    let status = sys::stat("/tmp/e/name").unwrap();
    assert_eq!((status.st_gid, status.st_mode & 0o060), (4321, 0o060));
    storage::unmount("/tmp/e").unwrap();
    // The command line has agent.hotplug_timeout=1.
    let missing = storage::mount_storage(&mount("blk", "1e", "ext4", "", "/tmp/f")).unwrap_err();
    assert!(missing.code == code::NOT_FOUND && missing.message.contains("PCI path 1e after 1000 ms"), "{missing}");
    assert!(storage::mount_storage(&mount("blk", "09", "ext4", "", "/tmp/f")).is_err(), "that is the NIC");
    let wrong = storage::mount_storage(&mount("blk", "05", "xyz", "", "/tmp/f")).unwrap_err();
    assert!(wrong.message.contains("no file system \"xyz\""), "{wrong}");
}

#[test]
fn persistent_memory_is_a_disk() {
    if !fs::exists("/dev/pmem0") {
        return eprintln!("skipped: this guest has no driver for virtio-pmem");
    }
    check_disk(&mount("nvdimm", "/dev/pmem0", "ext4", "ro", "/tmp/pmem"), "pmem");
    check_disk(&mount("pmem", "0c", "ext4", "ro,dax", "/tmp/pmem"), "pmem");
    assert_eq!(fs::read_to_string("/sys/block/pmem0/queue/write_cache").unwrap(), "write through\n");
}

#[test]
fn the_share_is_mounted_by_its_tag() {
    let mut share = mount("9p", "kataShared", "9p", "nosuid,nodev,cache=mmap", "/tmp/share");
    storage::mount_storage(&share).unwrap();
    assert_eq!(fs::read_to_string("/tmp/share/name").unwrap().trim(), "share");
    assert!(mounts().lines().any(|line| line.contains("/tmp/share") && line.contains("nosuid")));
    storage::unmount("/tmp/share").unwrap();
    share.source = "noSuchTag".into();
    assert!(storage::mount_storage(&share).unwrap_err().message.contains("noSuchTag"));
}

#[test]
fn an_interface_is_found_by_address_and_gets_its_mac() {
    netlink::bring_up_loopback().unwrap();
    let wanted = Interface {
        name: "net0".into(),
        hw_addr: "02:0a:00:00:00:77".into(),
        device_path: "09".into(),
        mtu: 1400,
        ip_addresses: vec![IPAddress { family: 0, address: "10.9.8.7".into(), mask: "24".into() }],
        ..Default::default()
    };
    for _ in 0..2 {
        let after = netlink::update_interface(&wanted).unwrap();
        assert_eq!((after.name.as_str(), after.hw_addr.as_str(), after.mtu), ("net0", "02:0a:00:00:00:77", 1400));
        assert!(after.ip_addresses.iter().any(|ip| ip.address == "10.9.8.7" && ip.mask == "24"));
    }
    let default = Route { gateway: "10.9.8.1".into(), device: "net0".into(), ..Default::default() };
    let routes = routes::update_routes(&Routes { routes: vec![default] }).unwrap();
    assert!(routes.routes.iter().any(|route| route.dest.is_empty() && route.gateway == "10.9.8.1"));
    assert!(netlink::network_stats().unwrap().iter().any(|stats| stats.name == "net0"));
    let mut absent = wanted;
    absent.device_path = "1e".into();
    let error = netlink::update_interface(&absent).unwrap_err();
    assert!(error.message.starts_with("Link not found"), "{error}");
}

#[test]
fn clock_and_entropy_are_set() {
    guest::set_date_time(2_000_000_000, 250_000).unwrap();
    let now = sys::clock_ns(libc::CLOCK_REALTIME) / 1_000_000_000;
    assert!((2_000_000_000..2_000_000_600).contains(&now), "{now}");
    guest::reseed(&[0x5a; 64]).unwrap();
}

#[test]
fn processors_and_memory_are_turned_on() {
    let online = "/sys/devices/system/cpu/cpu1/online";
    fs::write_existing(online, "0").unwrap();
    assert_eq!(guest::online_cpu_mem(true, 1, false), Ok(1));
    assert_eq!(fs::read_to_string(online).unwrap().trim(), "1");
    assert_eq!(guest::online_cpu_mem(false, 1, true), Ok(0));
    let late = guest::online_cpu_mem(true, 1, true).unwrap_err();
    assert!(late.code == code::DEADLINE_EXCEEDED && late.message.contains("0 of 1"), "{late}");
    if fs::exists("/sys/devices/system/memory/block_size_bytes") {
        assert!(guest::memory_block_size().unwrap() >= 1 << 20);
    }
    assert!(guest::supports_memory_probe() || guest::probe_memory(&[0]).is_err());
}

#[test]
fn modules_are_loaded_by_name() {
    let missing = guest::load_module("no_such_module", &[]).unwrap_err();
    assert!(missing.code == code::NOT_FOUND && missing.message.contains("no_such_module"), "{missing}");
    if !fs::is_dir("/sys/module/dummy") && fs::exists(format!("/lib/modules/{}/modules.dep", release())) {
        guest::load_module("dummy", &["numdummies=3".into()]).unwrap();
        assert!(fs::is_dir("/sys/class/net/dummy2"));
        guest::load_module("dummy", &[]).unwrap();
    }
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim().to_string()
}
