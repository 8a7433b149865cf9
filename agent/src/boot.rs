//! PID 1 of the guest: kernel file systems, modules, and out of the initial root file system.

use crate::cmdline::{self, Settings};
use crate::prelude::*;
use crate::sys::{self, Errno, AT_FDCWD};
use crate::{fs, log};

const NOSUID: u64 = libc::MS_NOSUID;
const KERNEL_FS: u64 = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;

/// (source and type, target, flags, data), in order.
const MOUNTS: &[(&str, &str, u64, &str)] = &[
    ("proc", "/proc", KERNEL_FS, ""),
    ("sysfs", "/sys", KERNEL_FS, ""),
    ("devtmpfs", "/dev", NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", libc::MS_NOSUID | libc::MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", libc::MS_NOSUID | libc::MS_NODEV, "mode=1777"),
    ("tmpfs", "/run", libc::MS_NOSUID | libc::MS_NODEV, "mode=0755"),
    ("tmpfs", "/tmp", libc::MS_NOSUID | libc::MS_NODEV, "mode=1777"),
];

const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
    ("/run", "/var/run"),
];

/// Limits that an init system raises on a host. PID 1 sets them, and every process without limits of its own inherits
/// them: (resource, soft, hard). The number of files is systemd's soft and the kernel's hard limit. The kernel derives
/// the others from the guest's memory, which is only as large as its containers need.
const LIMITS: &[(u32, u64, u64)] = &[
    (libc::RLIMIT_NOFILE, 1024, 1 << 20),
    (libc::RLIMIT_NPROC, libc::RLIM_INFINITY, libc::RLIM_INFINITY),
    (libc::RLIMIT_SIGPENDING, 1 << 17, 1 << 17),
];

/// Kernel parameters that are higher on a host because it is larger, or because its init system sets them. In a guest
/// they need not bound anything: the containers' limits do.
const SYSCTLS: &[(&str, &str)] = &[
    // Without it a mapping larger than the machine is refused; only touched pages count against the container's limit.
    // The kubelet sets it on its nodes, too.
    ("vm/overcommit_memory", "1"),
    ("vm/max_map_count", "1048576"), // Elasticsearch asks for 262144; distributions' default since 2024
    ("kernel/pid_max", "4194304"),   // systemd: the kernel's largest
    ("kernel/threads-max", "1048576"),
    ("fs/file-max", "9223372036854775807"), // systemd
    ("fs/nr_open", "1073741816"),           // systemd
    ("fs/inotify/max_user_watches", "524288"),
    ("fs/inotify/max_user_instances", "8192"),
];

/// Module list of the initrd: one path of a `.ko` a line, in the order of loading, parameters behind it.
const MODULES: &str = "/etc/modules";

/// Where archives appended to the initrd are unpacked (extensions). They stay in place and are bind-mounted into the
/// new root.
const EXTENSIONS: &str = "/ext";

/// Sets the guest up. A failure that leaves the guest usable is only logged.
pub fn init() -> Settings {
    let left = leave_rootfs();
    for (kind, target, flags, data) in MOUNTS {
        if let Err(e) = fs::create_dir_all(target, 0o755).and_then(|()| sys::mount(kind, target, kind, *flags, data)) {
            // The kernel may have mounted devtmpfs itself.
            if e.0 != libc::EBUSY {
                log::error(&format!("mount {target}: {e}"));
            }
        }
    }
    open_console();
    if let Err(e) = left {
        log::error(&format!("leave the initial root file system: {e}"));
    }
    for (target, path) in LINKS {
        match sys::symlinkat(target, AT_FDCWD, path) {
            Ok(()) | Err(Errno(libc::EEXIST)) => {}
            Err(e) => log::warn(&format!("symlink {path}: {e}")),
        }
    }
    raise_limits();
    let (settings, warnings) = cmdline::parse_kernel(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    log::set_level(settings.level);
    for warning in warnings {
        log::warn(&warning);
    }
    settings
}

fn raise_limits() {
    for (name, value) in SYSCTLS {
        if let Err(e) = fs::write_existing(format!("/proc/sys/{name}"), value) {
            log::warn(&format!("set {name} to {value}: {e}"));
        }
    }
    for (resource, soft, hard) in LIMITS {
        if let Err(e) = sys::set_rlimit(0, *resource, *soft, *hard) {
            log::warn(&format!("set resource limit {resource} to {soft}:{hard}: {e}"));
        }
    }
}

/// Modules first (their files are in the initial root), then a tmpfs over `/`, because pivot_root refuses to work on
/// the initial rootfs, and every file there freed: the modules and this program's name. The program itself keeps
/// running from its pages.
fn leave_rootfs() -> Result<()> {
    load_modules();
    fs::create_dir_all("/newroot", 0o755).context("mkdir /newroot")?;
    sys::mount("tmpfs", "/newroot", "tmpfs", libc::MS_NODEV | libc::MS_NOSUID, "mode=0755,size=16m,nr_inodes=16k")
        .context("mount the new root")?;
    for dir in ["etc", "var"] {
        fs::mkdir(format!("/newroot/{dir}"), 0o755).context("mkdir in the new root")?;
    }
    keep_debug_tools();
    let old = sys::open("/", libc::O_RDONLY | libc::O_DIRECTORY, 0).context("open /")?;
    let extended = fs::is_dir(EXTENSIONS);
    if extended {
        let place = format!("/newroot{EXTENSIONS}");
        fs::mkdir(&place, 0o755).context("mkdir in the new root")?;
        sys::mount(EXTENSIONS, &place, "", libc::MS_BIND, "").context("keep the extensions")?;
    }
    sys::chdir("/newroot").context("chdir to the new root")?;
    for entry in fs::list_fd(old.raw()).context("list the initial root")? {
        // The new root itself is another file system and stays.
        if extended && entry.name == EXTENSIONS.as_bytes()[1..] {
            continue;
        }
        let _ = remove_below(old.raw(), &entry.name);
    }
    sys::mount(".", "/", "", libc::MS_MOVE, "").context("move the new root over /")?;
    sys::chroot(".").context("chroot")?;
    sys::chdir("/").context("chdir /")
}

/// Copies what an initrd for debugging has in /debug (a static shell as `sh`) to /bin of the new root.
fn keep_debug_tools() {
    let Ok(names) = fs::names("/debug") else { return };
    let _ = fs::mkdir("/newroot/bin", 0o755);
    for name in names {
        let to = format!("/newroot/bin/{name}");
        let kept = fs::read(format!("/debug/{name}")).and_then(|data| {
            fs::write(&to, &data)?;
            sys::fchmodat(AT_FDCWD, &to, 0o755)
        });
        if let Err(e) = kept {
            log::warn(&format!("keep /debug/{name}: {e}"));
        }
    }
}

/// Like `rm -r --one-file-system`, going on after errors.
fn remove_below(dir: sys::RawFd, name: &[u8]) -> core::result::Result<(), Errno> {
    if sys::unlinkat(dir, name, 0).is_ok() {
        return Ok(());
    }
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let fd = sys::openat2(dir, name, flags, 0, libc::RESOLVE_NO_XDEV)?;
    for entry in fs::list_fd(fd.raw())? {
        let _ = remove_below(fd.raw(), &entry.name);
    }
    sys::unlinkat(dir, name, libc::AT_REMOVEDIR)
}

fn load_modules() {
    for line in fs::read_to_string(MODULES).unwrap_or_default().lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (path, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let loaded = sys::open(path, libc::O_RDONLY, 0).and_then(|fd| sys::finit_module(fd.raw(), parameters.trim()));
        match loaded {
            Ok(()) | Err(Errno(libc::EEXIST)) => {}
            Err(e) => log::warn(&format!("load module {path}: {e}")),
        }
    }
}

/// The console becomes the log. The standard descriptors must exist; otherwise the next file to be opened would become
/// one of them.
fn open_console() {
    let null = loop {
        match sys::open("/dev/null", libc::O_RDWR, 0) {
            Ok(fd) if fd.raw() > 2 => break fd,
            Ok(fd) => drop(fd.into_raw()),
            Err(e) => {
                log::error(&format!("open /dev/null: {e}"));
                return;
            }
        }
    };
    for standard in 0..3 {
        let _ = sys::dup_to(null.raw(), standard);
    }
    let console = sys::open("/dev/console", libc::O_WRONLY | libc::O_NOCTTY | libc::O_NONBLOCK, 0)
        .or_else(|_| sys::open("/dev/kmsg", libc::O_WRONLY, 0));
    if let Ok(fd) = console {
        log::set_output(fd.into_raw());
    }
}

/// Powers the machine off, or ends the process where the agent is not PID 1.
pub fn power_off() -> ! {
    sys::sync();
    if sys::getpid() == 1 {
        let _ = sys::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF as u32);
        // Without ACPI the kernel may only halt; a reset ends the VM as well (-no-reboot).
        let _ = sys::reboot(libc::LINUX_REBOOT_CMD_RESTART as u32);
    }
    sys::exit(0)
}
