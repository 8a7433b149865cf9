use super::*;
use crate::test_support::TempDir;

struct Root {
    dir: TempDir,
    fd: Fd,
}

impl Root {
    fn new() -> Root {
        let dir = TempDir::new("files");
        let path = dir.dir("root");
        dir.file("secret", "outside");
        let fd = sys::open(&path, libc::O_PATH | libc::O_DIRECTORY, 0).unwrap();
        Root { dir, fd }
    }

    fn at(&self, path: &str) -> String {
        format!("{}/root/{path}", self.dir.0)
    }

    fn link(&self, target: &str, path: &str) {
        sys::symlinkat(target, libc::AT_FDCWD, self.at(path)).unwrap();
    }

    fn stat(&self, path: &str, follow: bool) -> Result<FileInfo> {
        stat(self.fd.raw(), &StatFileRequest { path: path.into(), follow, ..Default::default() })
    }

    fn read(&self, path: &str, offset: u64, len: u32) -> Result<Vec<u8>> {
        read(self.fd.raw(), &ReadFileRequest { path: path.into(), offset, len, ..Default::default() }).map(|r| r.data)
    }

    fn write(&self, path: &str, offset: u64, data: &[u8], truncate: bool) -> Result<()> {
        let request =
            WriteFileRequest { path: path.into(), offset, data: data.to_vec(), truncate, ..Default::default() };
        write(self.fd.raw(), &request)
    }

    fn mkdir(&self, path: &str, parents: bool) -> Result<()> {
        mkdir(self.fd.raw(), &MkdirRequest { path: path.into(), parents, ..Default::default() })
    }

    fn remove(&self, path: &str, recursive: bool) -> Result<()> {
        remove(self.fd.raw(), &RemoveFileRequest { path: path.into(), recursive, ..Default::default() })
    }

    fn sync(&self, path: &str) -> Result<()> {
        sync(self.fd.raw(), &SyncFilesRequest { path: path.into(), ..Default::default() })
    }

    fn list(&self, path: &str, after: &str, limit: u32) -> Result<(Vec<String>, bool)> {
        let request = ListFilesRequest { path: path.into(), after: after.into(), limit, ..Default::default() };
        let page = list(self.fd.raw(), &request)?;
        let names = page.entries.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned());
        Ok((names.collect(), page.more))
    }
}

fn status<T: core::fmt::Debug>(outcome: Result<T>) -> i32 {
    outcome.unwrap_err().code
}

#[test]
fn a_directorys_file_system_is_written_to_its_disk() {
    let root = Root::new();
    root.mkdir("/a/b", true).unwrap();
    root.write("/a/b/file", 0, b"text", true).unwrap();
    root.sync("/").unwrap();
    root.sync("/a/b/..").unwrap();
    assert_eq!(status(root.sync("/a/b/file")), code::FAILED_PRECONDITION);
    assert_eq!(status(root.sync("/none")), code::NOT_FOUND);
    root.link("/etc", "out");
    assert_eq!(status(root.sync("/out")), code::NOT_FOUND, "a link leads nowhere outside");
}

#[test]
fn files_are_written_read_and_described() {
    let root = Root::new();
    root.write("/a", 0, b"hello world", false).unwrap();
    root.write("a", 6, b"there", false).unwrap();
    assert_eq!(root.read("/a", 0, 100).unwrap(), b"hello there");
    assert_eq!(root.read("/a", 6, 3).unwrap(), b"the");
    assert_eq!((root.read("/a", 11, 0).unwrap(), root.read("/a", 99, 0).unwrap()), (vec![], vec![]));
    root.write("/a", 0, b"new", true).unwrap();
    let info = root.stat("/a", false).unwrap();
    assert_eq!((info.name.as_slice(), info.mode, info.size), (b"a".as_slice(), libc::S_IFREG | 0o644, 3));
    let request = WriteFileRequest {
        path: b"/a".to_vec(),
        mode: Some(0o4750),
        mtime_ns: Some(-1_500_000_000),
        ..Default::default()
    };
    write(root.fd.raw(), &request).unwrap();
    let info = root.stat("//a", true).unwrap();
    assert_eq!((info.mode & 0o7777, info.mtime_ns, info.size), (0o4750, -1_500_000_000, 3));
    root.link("a", "link");
    assert_eq!(root.stat("link", false).unwrap().link_target, b"a");
    assert_eq!(root.stat("link", true).unwrap().size, 3);
    assert_eq!(root.read("link", 0, 0).unwrap(), b"new");
    // Names need not be text.
    let odd = [b'/', 0xff, b'\n'];
    write(root.fd.raw(), &WriteFileRequest { path: odd.to_vec(), ..Default::default() }).unwrap();
    let info = stat(root.fd.raw(), &StatFileRequest { path: odd.to_vec(), ..Default::default() }).unwrap();
    assert_eq!(info.name, &odd[1..]);
}

#[test]
fn errors_have_fitting_codes() {
    let root = Root::new();
    root.mkdir("d/e", true).unwrap();
    assert_eq!(status(root.stat("/none", true)), code::NOT_FOUND);
    assert_eq!(status(root.read("/d", 0, 0)), code::FAILED_PRECONDITION);
    assert_eq!(status(root.write("/d", 0, b"", false)), code::FAILED_PRECONDITION);
    assert_eq!(status(root.write("/none/x", 0, b"", false)), code::NOT_FOUND);
    assert_eq!(status(root.mkdir("d", false)), code::ALREADY_EXISTS);
    assert_eq!(status(root.remove("d", false)), code::FAILED_PRECONDITION);
    assert_eq!(status(root.remove("/", true)), code::INVALID_ARGUMENT);
    assert_eq!(status(root.remove("d/..", true)), code::INVALID_ARGUMENT);
    assert_eq!(status(root.read("x", u64::MAX, 5)), code::INVALID_ARGUMENT);
    assert_eq!(status(root.write("x", i64::MAX as u64, b"x", false)), code::INVALID_ARGUMENT);
    for empty in [status(root.stat("", true)), status(root.list("", "", 0)), status(root.mkdir("", true))] {
        assert_eq!(empty, code::INVALID_ARGUMENT);
    }
    assert!(root.stat("/no\nne", true).unwrap_err().message.contains("no\\nne"), "control characters are escaped");
}

#[test]
fn further_names_and_nodes() {
    let root = Root::new();
    root.mkdir("/d", true).unwrap();
    root.write("/d/a", 0, b"x", false).unwrap();
    let request = |path: &str, target: &str| LinkRequest {
        path: path.as_bytes().to_vec(),
        target: target.as_bytes().to_vec(),
        ..Default::default()
    };
    link(root.fd.raw(), &request("/b", "/d/../d/a")).unwrap();
    let (a, b) = (root.stat("/d/a", false).unwrap(), root.stat("/b", false).unwrap());
    assert_eq!((a.device, a.number, a.links), (b.device, b.number, 2));
    assert_eq!(status(link(root.fd.raw(), &request("/b", "/d/a"))), code::ALREADY_EXISTS);
    assert_eq!(status(link(root.fd.raw(), &request("/c", "/none"))), code::NOT_FOUND);
    assert_ne!(status(link(root.fd.raw(), &request("/c", "/d"))), code::OK);
    let mut node_at = NodeRequest { path: b"/f".to_vec(), mode: libc::S_IFIFO | 0o640, ..Default::default() };
    node(root.fd.raw(), &node_at).unwrap();
    assert_eq!(root.stat("/f", false).unwrap().mode & libc::S_IFMT, libc::S_IFIFO);
    assert_eq!(status(node(root.fd.raw(), &node_at)), code::ALREADY_EXISTS);
    for kind in [libc::S_IFREG, libc::S_IFSOCK, libc::S_IFDIR, 0] {
        node_at.mode = kind | 0o600;
        assert_eq!(status(node(root.fd.raw(), &node_at)), code::INVALID_ARGUMENT);
    }
}

#[test]
fn what_is_there_gives_way_only_to_what_could_be_made() {
    let root = Root::new();
    let fd = root.fd.raw();
    let link_at = |path: &str, target: &str| {
        let (path, target) = (path.as_bytes().to_vec(), target.as_bytes().to_vec());
        link(fd, &LinkRequest { path, target, replace: true, ..Default::default() })
    };
    let symlink_at = |path: &str| {
        let (path, target) = (path.as_bytes().to_vec(), b"x".to_vec());
        symlink(fd, &SymlinkRequest { path, target, replace: true, ..Default::default() })
    };
    let node_at = |path: &str| {
        let request = NodeRequest { path: path.as_bytes().to_vec(), mode: libc::S_IFIFO | 0o600, ..Default::default() };
        node(fd, &NodeRequest { replace: true, ..request })
    };
    let kind = |path: &str| root.stat(path, false).unwrap().mode & libc::S_IFMT;
    for path in ["a", "b", "old", "full/file"] {
        root.mkdir("full", true).unwrap();
        root.write(path, 0, path.as_bytes(), false).unwrap();
    }
    // A link that cannot be made, here to a directory, as well as one to another mount, costs nothing.
    assert_ne!(status(link_at("old", "full")), code::OK);
    assert_eq!(status(link_at("old", "none")), code::NOT_FOUND);
    assert_eq!(root.read("old", 0, 0).unwrap(), b"old");
    link_at("b", "a").unwrap();
    assert_eq!(root.read("b", 0, 0).unwrap(), b"a");
    // A name that it has already, be it the very same.
    link_at("b", "a").unwrap();
    link_at("a", "a").unwrap();
    assert_eq!(root.stat("a", false).unwrap().links, 2);
    symlink_at("b").unwrap();
    assert_eq!(kind("b"), libc::S_IFLNK);
    node_at("b").unwrap();
    assert_eq!(kind("b"), libc::S_IFIFO);
    // A directory does only if it is empty.
    root.mkdir("empty", true).unwrap();
    link_at("empty", "a").unwrap();
    assert_eq!(kind("empty"), libc::S_IFREG);
    for failed in [link_at("full", "a"), symlink_at("full"), node_at("full")] {
        assert_eq!(status(failed), code::FAILED_PRECONDITION);
    }
    assert_eq!(root.read("full/file", 0, 0).unwrap(), b"full/file");
    assert_eq!(root.list("/", "", 0).unwrap().0, ["a", "b", "empty", "full", "old"], "nothing is left beside them");
}

#[test]
fn directories_links_and_removal() {
    let root = Root::new();
    root.mkdir("/a/b/../c", true).unwrap();
    root.mkdir("/a", true).unwrap();
    root.mkdir("/", true).unwrap();
    assert_eq!(root.list("/a", "", 0).unwrap(), (vec!["b".into(), "c".into()], false));
    let request = MkdirRequest { path: b"/a/b".to_vec(), parents: true, mode: Some(0o1777), ..Default::default() };
    mkdir(root.fd.raw(), &request).unwrap();
    assert_eq!(root.stat("/a/b", false).unwrap().mode & 0o7777, 0o1777);
    let request = SymlinkRequest { path: b"/a/l".to_vec(), target: b"/a/b".to_vec(), ..Default::default() };
    symlink(root.fd.raw(), &request).unwrap();
    assert_eq!(status(symlink(root.fd.raw(), &request)), code::ALREADY_EXISTS);
    root.mkdir("/a/l/through", true).unwrap();
    assert!(fs::is_dir(root.at("a/b/through")));
    root.remove("/a/l", true).unwrap();
    assert!(fs::is_dir(root.at("a/b/through")), "the link went, not what it pointed to");
    root.remove("/a/c", false).unwrap();
    root.remove("/a", true).unwrap();
    assert_eq!(root.list("/", "", 0).unwrap(), (vec![], false));
}

#[test]
fn long_directories_come_in_pages() {
    let root = Root::new();
    for n in 0..25 {
        root.write(&format!("f{n:02}"), 0, b"", false).unwrap();
    }
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let (names, more) = root.list("/", &after, 10).unwrap();
        assert!(names.len() <= 10);
        after = names.last().unwrap().clone();
        all.extend(names);
        if !more {
            break;
        }
    }
    assert_eq!(all, (0..25).map(|n| format!("f{n:02}")).collect::<Vec<_>>());
    assert_eq!(root.list("/", "f24", 10).unwrap(), (vec![], false));
    assert!(!root.list("/", "", 25).unwrap().1);
}

#[test]
fn nothing_leads_out_of_the_root() {
    let root = Root::new();
    root.link("../secret", "up");
    root.link(&format!("{}/secret", root.dir.0), "absolute");
    root.link("/proc/self/root", "magic");
    root.link("/", "top");
    for path in ["up", "absolute", "../secret", "/../../secret", "top/../secret"] {
        assert_eq!(status(root.read(path, 0, 0)), code::NOT_FOUND, "{path}");
    }
    assert!(root.stat("/..", true).unwrap().mode & libc::S_IFDIR != 0, "above the root is the root");
    // Writing through a link that leads nowhere inside the root makes nothing anywhere.
    assert!(root.write("up", 0, b"x", true).is_err());
    assert_eq!(fs::read_to_string(format!("{}/secret", root.dir.0)).unwrap(), "outside");
    assert!(root.mkdir("../new", false).is_ok() && fs::is_dir(root.at("new")));
    // Magic links are refused where /proc really is below the root.
    let proc_root = sys::open("/", libc::O_PATH | libc::O_DIRECTORY, 0).unwrap();
    let request = StatFileRequest { path: b"/proc/self/root/etc".to_vec(), follow: true, ..Default::default() };
    assert_eq!(status(stat(proc_root.raw(), &request)), code::PERMISSION_DENIED);
}

#[test]
fn special_files_are_not_opened() {
    let root = Root::new();
    sys::mknodat(libc::AT_FDCWD, root.at("fifo"), libc::S_IFIFO | 0o666, 0).unwrap();
    assert_eq!(root.stat("fifo", true).unwrap().mode & libc::S_IFMT, libc::S_IFIFO);
    assert_eq!(status(root.read("fifo", 0, 0)), code::PERMISSION_DENIED);
    assert_eq!(status(root.write("fifo", 0, b"x", true)), code::PERMISSION_DENIED);
}
