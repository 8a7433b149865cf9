use super::*;
use crate::fs;
use crate::test_support::{in_namespaces, TempDir};

fn parse(text: &str) -> MountOptions {
    parse_options(&text.split(',').collect::<Vec<_>>()).unwrap()
}

#[test]
fn flags_propagation_and_data_are_told_apart() {
    let parsed =
        parse("nosuid,nodev,size=64m,rslave,mode=1777,,private,x-systemd.automount,_netdev,tmpcopyup,defaults");
    assert_eq!(parsed.flags, MS_NOSUID | MS_NODEV);
    assert_eq!(parsed.propagation, [MS_SLAVE | MS_REC, MS_PRIVATE]);
    assert_eq!(parsed.data, "size=64m,mode=1777");
    assert!(parsed.tmpcopyup && parsed.clear_flags == 0 && parsed.recursive_attributes().is_none());
}

#[test]
fn the_last_option_wins() {
    let parsed = parse("ro,rw,noexec");
    assert_eq!((parsed.flags, parsed.clear_flags), (MS_NOEXEC, MS_RDONLY));
    let parsed = parse("rw,ro,dev,nodev");
    assert_eq!((parsed.flags, parsed.clear_flags), (MS_RDONLY | MS_NODEV, 0));
    let parsed = parse("rro,rrw,rnosuid,rnoatime");
    assert_eq!((parsed.recursive_set, parsed.recursive_clear), (ATTR_NOSUID | ATTR_NOATIME, ATTR_RDONLY | ATTR_ATIME));
    let parsed = parse("rnoatime,rstrictatime");
    assert_eq!((parsed.recursive_set, parsed.recursive_clear), (ATTR_STRICTATIME, ATTR_ATIME));
    let parsed = parse("rstrictatime,rrelatime");
    assert_eq!((parsed.recursive_set, parsed.recursive_clear), (0, ATTR_ATIME));
}

#[test]
fn bind_mounts_get_attributes() {
    let parsed = parse("rbind,ro,nosuid,dev,noatime");
    assert_eq!(parsed.flags & (MS_BIND | MS_REC), MS_BIND | MS_REC);
    let attr = parsed.attributes();
    assert_eq!((attr.set, attr.clear), (ATTR_RDONLY | ATTR_NOSUID | ATTR_NOATIME, ATTR_NODEV | ATTR_ATIME));
    assert_eq!((parse("bind").attributes().set, parse("bind").attributes().clear), (0, 0));
    assert!(parse_options(&["idmap"]).unwrap_err().message.contains("idmap"));
}

#[test]
fn every_table_is_sorted_and_without_doubles() {
    assert!(FLAGS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    assert!(PROPAGATION.windows(2).all(|pair| pair[0].0 < pair[1].0));
    assert!(RECURSIVE.windows(2).all(|pair| pair[0].0 < pair[1].0));
}

/// The flags field of the topmost mount on `path`.
fn mounted(path: &str) -> String {
    let table = fs::read_to_string("/proc/thread-self/mounts").unwrap();
    let line = table.lines().rev().find(|line| line.split(' ').nth(1) == Some(path)).unwrap_or_default();
    line.split(' ').nth(3).unwrap_or_default().to_string()
}

fn has(path: &str, option: &str) -> bool {
    mounted(path).split(',').any(|candidate| candidate == option)
}

#[test]
fn the_kernel_mounts_as_told() {
    let dir = TempDir::new("mount");
    in_namespaces(libc::CLONE_NEWNS, || {
        let (tmpfs, bind) = (dir.dir("tmpfs"), dir.dir("bind"));
        parse("nosuid,nodev,size=1m,mode=750").mount("tmpfs", &tmpfs, "tmpfs").unwrap();
        assert!(has(&tmpfs, "nosuid") && has(&tmpfs, "mode=750") && !has(&tmpfs, "noexec"));
        // A read-only bind mount keeps what its source has; "dev" gives up what it names.
        parse("rbind,ro,rprivate").mount(&tmpfs, &bind, "bind").unwrap();
        assert!(has(&bind, "ro") && has(&bind, "nosuid") && has(&bind, "nodev"));
        sys::umount(&bind, 0).unwrap();
        parse("dev,rw").mount(&tmpfs, &bind, "bind").unwrap();
        assert!(has(&bind, "rw") && has(&bind, "nosuid") && !has(&bind, "nodev"));
        sys::umount(&bind, 0).unwrap();
        // Recursive attributes reach what is mounted below the source.
        let below = dir.dir("tmpfs/below");
        parse("").mount("tmpfs", &below, "tmpfs").unwrap();
        parse("rbind,rro").mount(&tmpfs, &bind, "bind").unwrap();
        assert!(has(&bind, "ro") && has(&format!("{bind}/below"), "ro") && has(&below, "rw"));
        sys::umount(&bind, libc::MNT_DETACH).unwrap();
        parse("remount,size=2m").mount("tmpfs", &tmpfs, "tmpfs").unwrap();
        assert!(has(&tmpfs, "size=2048k"), "{}", mounted(&tmpfs));
        let error = parse("").mount("x", &tmpfs, "no_such_fs").unwrap_err();
        assert!(error.message.contains("no file system \"no_such_fs\""), "{error}");
        sys::umount(&below, 0).unwrap();
        sys::umount(&tmpfs, 0).unwrap();
    });
}

#[test]
fn a_hundred_layers_with_long_paths() {
    let dir = TempDir::new("layers");
    in_namespaces(libc::CLONE_NEWNS, || {
        let tmpfs = dir.dir("tmpfs");
        parse("").mount("tmpfs", &tmpfs, "tmpfs").unwrap();
        let layers: Vec<String> = (0..100)
            .map(|n| {
                dir.file(&format!("tmpfs/a-directory-with-quite-a-long-name-{n}/file{n}"), "");
                format!("{tmpfs}/a-directory-with-quite-a-long-name-{n}")
            })
            .collect();
        let (upper, work, merged) = (dir.dir("tmpfs/upper"), dir.dir("tmpfs/work"), dir.dir("merged"));
        let data = format!("lowerdir={},upperdir={upper},workdir={work}", layers.join(":"));
        assert!(data.len() > DATA_MAX);
        match parse(&data).mount("overlay", &merged, "overlay") {
            Err(e) if e.message.contains("no file system") => return eprintln!("skipped: {e}"),
            other => other.unwrap(),
        }
        assert_eq!(fs::names(&merged).unwrap().len(), 100);
        fs::write(format!("{merged}/new"), b"").unwrap();
        assert!(fs::exists(format!("{upper}/new")));
        sys::umount(&merged, 0).unwrap();
        let too_many = format!("lowerdir={}", vec![tmpfs.clone(); 400].join(":"));
        assert!(parse(&too_many).mount("overlay", &merged, "overlay").unwrap_err().message.contains("too long"));
        sys::umount(&tmpfs, 0).unwrap();
    });
}
