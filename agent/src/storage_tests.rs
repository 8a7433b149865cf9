use super::*;
use crate::errors::code;
use crate::proto::agent::FSGroup;
use crate::test_support::{in_namespaces, TempDir};

fn storage(driver: &str, source: &str, fstype: &str, options: &str, mount_point: &str) -> Storage {
    Storage {
        driver: driver.into(),
        source: source.into(),
        fstype: fstype.into(),
        options: options.split(',').filter(|option| !option.is_empty()).map(Into::into).collect(),
        mount_point: mount_point.into(),
        ..Default::default()
    }
}

fn mounted(path: &str) -> String {
    let table = fs::read_to_string("/proc/thread-self/mounts").unwrap();
    table.lines().rev().find(|line| line.split(' ').nth(1) == Some(path)).unwrap_or_default().to_string()
}

#[test]
fn what_cannot_be_done_is_named() {
    let fails = |storage: &Storage| mount_storage(storage).unwrap_err();
    let unknown = fails(&storage("tape", "", "", "", "/x"));
    assert!(unknown.code == code::UNIMPLEMENTED && unknown.message.contains("\"tape\""), "{unknown}");
    for point in ["", "/", "x", "/a/../b", "/a/./b"] {
        assert_eq!(fails(&storage("local", "", "", "", point)).code, code::INVALID_ARGUMENT, "{point:?}");
    }
    assert!(fails(&storage("blk", "zz", "ext4", "", "/x")).message.contains("PCI path"));
    let mut encrypted = storage("blk", "05", "ext4", "", "/x");
    encrypted.driver_options = vec!["encryption_key=ephemeral".into()];
    assert!(fails(&encrypted).message.contains("encryption_key=ephemeral"));
    assert!(fails(&storage("local", "", "", "size=3", "/tmp/x")).message.contains("size=3"));
    assert!(fails(&storage("local", "", "", "mode=9", "/tmp/x")).message.contains("mode=9"));
    assert!(fails(&storage("bind", "/nonexistent", "bind", "", "/tmp/x")).message.contains("no such file"));
    assert!(fails(&storage("ephemeral", "tmpfs", "tmpfs", "fsgid=x", "/tmp/x")).message.contains("fsgid=x"));
    assert!(remount_ephemeral(&storage("blk", "", "", "", "/x")).unwrap_err().message.contains("blk"));
}

#[test]
fn an_ephemeral_storage_is_a_tmpfs_that_can_grow() {
    let dir = TempDir::new("ephemeral");
    in_namespaces(libc::CLONE_NEWNS, || {
        let point = format!("{}/deep/tmp", dir.0);
        let mut wanted = storage("ephemeral", "tmpfs", "tmpfs", "nosuid,size=1m,mode=0700,fsgid=12", &point);
        assert_eq!(mount_storage(&wanted).as_deref(), Ok(point.as_str()));
        assert!(mounted(&point).contains("size=1024k") && mounted(&point).contains("nosuid"));
        let status = sys::stat(&point).unwrap();
        assert_eq!((status.st_gid, status.st_mode & 0o7777), (12, 0o2700));
        wanted.options = vec!["size=4m".into(), "fsgid=12".into()];
        remount_ephemeral(&wanted).unwrap();
        assert!(mounted(&point).contains("size=4096k"));
        unmount(&point).unwrap();
        assert!(mounted(&point).is_empty());
        unmount(&point).unwrap();
    });
}

#[test]
fn a_local_storage_is_a_directory() {
    let dir = TempDir::new("local");
    let point = format!("{}/volume", dir.0);
    let mut wanted = storage("local", "local", "local", "mode=0777", &point);
    wanted.fs_group = Some(Box::new(FSGroup { group_id: 9, group_change_policy: 0 }));
    mount_storage(&wanted).unwrap();
    let status = sys::stat(&point).unwrap();
    assert_eq!((status.st_gid, status.st_mode & 0o7777), (9, 0o2777));
    unmount(&point).unwrap();
}

#[test]
fn bind_takes_directories_and_files() {
    let dir = TempDir::new("bind");
    in_namespaces(libc::CLONE_NEWNS, || {
        let file = dir.file("source/file", "text");
        let (tree, single) = (format!("{}/tree", dir.0), format!("{}/a/single", dir.0));
        mount_storage(&storage("bind", &dir.dir("source"), "bind", "rbind,ro", &tree)).unwrap();
        assert_eq!(fs::read_to_string(format!("{tree}/file")).unwrap(), "text");
        assert_eq!(fs::write(format!("{tree}/file"), b""), Err(Errno(libc::EROFS)));
        mount_storage(&storage("bind", &file, "bind", "", &single)).unwrap();
        assert_eq!(fs::read_to_string(&single).unwrap(), "text");
        // A mount in use is detached.
        let user = sys::open(&tree, libc::O_RDONLY | libc::O_DIRECTORY, 0).unwrap();
        unmount(&tree).unwrap();
        drop(user);
        unmount(&single).unwrap();
        assert!(fs::names(&tree).unwrap().is_empty());
        assert!(mount_storage(&storage("bind", &file, "bind", "size=1", &single)).is_err());
    });
}

#[test]
fn an_overlay_makes_its_directories() {
    let dir = TempDir::new("overlay");
    in_namespaces(libc::CLONE_NEWNS, || {
        let upper = format!("{}/rw", dir.0);
        // The writable layers need a file system that is no overlay itself.
        mount_storage(&storage("ephemeral", "tmpfs", "tmpfs", "", &upper)).unwrap();
        let lower = dir.dir("lower");
        dir.file("lower/old", "");
        sys::fchmodat(libc::AT_FDCWD, &lower, 0o751).unwrap();
        let point = format!("{}/rootfs", dir.0);
        let options = format!("lowerdir={lower},upperdir={upper}/upper,workdir={upper}/work");
        let mut wanted = storage("overlayfs", "overlay", "overlay", &options, &point);
        wanted.driver_options =
            vec![format!("{CREATE_DIRECTORY}{upper}/upper"), format!("{CREATE_DIRECTORY}{upper}/work")];
        match mount_storage(&wanted) {
            Err(e) if e.code == code::UNIMPLEMENTED => return eprintln!("skipped: {e}"),
            other => other.unwrap(),
        };
        assert_eq!(sys::stat(&point).unwrap().st_mode & 0o7777, 0o751);
        fs::write(format!("{point}/new"), b"").unwrap();
        assert_eq!(fs::names(&point).unwrap(), ["new", "old"]);
        assert!(fs::exists(format!("{upper}/upper/new")));
        unmount(&point).unwrap();

        let point = format!("{upper}/box/rootfs");
        let options = format!("lowerdir={lower},{OVERLAY_RW}");
        mount_storage(&storage("overlayfs", "overlay", "overlay", &options, &point)).unwrap();
        fs::write(format!("{point}/other"), b"").unwrap();
        assert!(fs::exists(format!("{upper}/box/upper/other")));
        unmount(&point).unwrap();
        let evil = storage("overlayfs", "overlay", "overlay", &format!("{CREATE_DIRECTORY}../../x"), &point);
        assert!(mount_storage(&evil).is_err());
        unmount(&upper).unwrap();
    });
}

#[test]
fn what_is_mounted_is_seen() {
    assert!(is_mounted("/proc").unwrap());
    assert!(!is_mounted("/proc/self").unwrap());
    assert!(!is_mounted("/nonexistent/place").unwrap());
}

#[test]
fn storages_of_the_sandbox_are_told_by_their_place() {
    assert!(is_of_sandbox("/run/kata-containers/sandbox/shm"));
    assert!(!is_of_sandbox("/run/kata-containers/sandboxes/shm"));
    assert!(!is_of_sandbox("/run/kata-containers/c1/rootfs"));
}
