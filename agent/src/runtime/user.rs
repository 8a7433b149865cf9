//! Who a container's process runs as: numbers from the spec, or names from the container's own files.

use crate::prelude::*;
use crate::proto::agent::StringUser;
use crate::proto::oci::User;
use crate::sys;

/// A file of the image is read up to here; a real passwd file is smaller, a hostile one may be endless.
const MAX_FILE: usize = 1 << 20;
/// What a line has to have: name, password, uid, gid. Images that somebody has written by hand leave the rest out.
const PASSWD_FIELDS: usize = 4;
/// Likewise: name, password, gid.
const GROUP_FIELDS: usize = 3;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    /// The home directory in the passwd file, "/" if there is none.
    pub home: String,
}

/// The requested user, not looked up yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// Name or number; empty = `uid` and `gid` count.
    user: String,
    /// Name or number; empty = the user's own.
    group: String,
    more_groups: Vec<String>,
}

impl Wanted {
    /// `text` (`StringUser`, or `USER[:GROUP]` in the spec's username) beats the numbers.
    pub fn new(user: Option<&User>, text: Option<&StringUser>) -> Wanted {
        let mut wanted = Wanted::default();
        if let Some(user) = user {
            wanted.uid = user.uid;
            wanted.gid = user.gid;
            wanted.groups.clone_from(&user.additional_gids);
            wanted.more_groups.clone_from(&user.additional_groups);
            let (name, group) = user.username.split_once(':').unwrap_or((&user.username, ""));
            wanted.user = name.to_string();
            wanted.group = group.to_string();
        }
        if let Some(text) = text.filter(|t| !t.uid.is_empty() || !t.gid.is_empty()) {
            wanted.user.clone_from(&text.uid);
            wanted.group.clone_from(&text.gid);
            wanted.more_groups.extend_from_slice(&text.additional_gids);
        }
        wanted
    }

    /// Looks up in `/etc/passwd` and `/etc/group` of the present root.
    pub fn resolve(&self) -> Result<Identity> {
        self.resolve_in(&read("/etc/passwd"), &read("/etc/group"))
    }

    /// The rules are Docker's: a named or known user brings the primary group and the memberships, unless a group is
    /// asked for; a number without an entry is taken as it is.
    fn resolve_in(&self, passwd: &str, group: &str) -> Result<Identity> {
        let mut found = Identity { uid: self.uid, gid: self.gid, groups: self.groups.clone(), home: "/".to_string() };
        let mut known: BTreeSet<u32> = found.groups.iter().copied().collect();
        if self.user.is_empty() && self.group.is_empty() {
            // For setresuid(2) it is "as it was", so the process would stay root.
            if [self.uid, self.gid].contains(&u32::MAX) {
                return Err(Error::invalid(format!("{} is no number of a user or group", u32::MAX)));
            }
            if let Some(entry) = entries(passwd, PASSWD_FIELDS).find(|e| e[2].parse() == Ok(self.uid)) {
                set_home(&mut found, entry.get(5).unwrap_or(&""));
            }
            return self.add_more_groups(found, group, known);
        }
        let user = if self.user.is_empty() { "0" } else { &self.user };
        // What can be read as a number is one, even if somebody is called that.
        let number: Option<i64> = user.parse().ok();
        let entry = entries(passwd, PASSWD_FIELDS).find(|e| match number {
            Some(number) => e[2].parse() == Ok(number),
            None => e[0] == user,
        });
        match (entry, number) {
            (Some(entry), _) => {
                found.uid = id(entry[2], "/etc/passwd")?;
                found.gid = id(entry[3], "/etc/passwd")?;
                set_home(&mut found, entry.get(5).unwrap_or(&""));
                if self.group.is_empty() {
                    let is_in = |e: &Vec<&str>| e.get(3).is_some_and(|all| all.split(',').any(|one| one == entry[0]));
                    for line in entries(group, GROUP_FIELDS).filter(is_in) {
                        push_new(&mut found.groups, &mut known, id(line[2], "/etc/group")?);
                    }
                }
            }
            (None, Some(number)) => {
                found.uid = in_range(number, user)?;
                found.gid = 0;
            }
            (None, None) => {
                return Err(Error::invalid(format!("unable to find user {user}: no matching entries in passwd file")))
            }
        }
        if !self.group.is_empty() {
            found.gid = group_id(&self.group, group)?;
        }
        // As in Docker since CVE-2022-36109: a process that takes another primary group with setgid(2) keeps this one,
        // so a file from which this group is shut out stays shut.
        if known.insert(found.gid) {
            found.groups.insert(0, found.gid);
        }
        self.add_more_groups(found, group, known)
    }

    fn add_more_groups(&self, mut found: Identity, group: &str, mut known: BTreeSet<u32>) -> Result<Identity> {
        for name in &self.more_groups {
            push_new(&mut found.groups, &mut known, group_id(name, group)?);
        }
        Ok(found)
    }
}

fn set_home(found: &mut Identity, home: &str) {
    if !home.is_empty() {
        found.home = home.to_string();
    }
}

fn push_new(groups: &mut Vec<u32>, known: &mut BTreeSet<u32>, gid: u32) {
    if known.insert(gid) {
        groups.push(gid);
    }
}

fn group_id(name: &str, group: &str) -> Result<u32> {
    let number: Option<i64> = name.parse().ok();
    let entry = entries(group, GROUP_FIELDS).find(|e| match number {
        Some(number) => e[2].parse() == Ok(number),
        None => e[0] == name,
    });
    match (entry, number) {
        (Some(entry), _) => id(entry[2], "/etc/group"),
        (None, Some(number)) => in_range(number, name),
        (None, None) => Err(Error::invalid(format!("unable to find group {name}: no matching entries in group file"))),
    }
}

/// A number in the image's files; there may be some beyond `in_range` (4294967294 was nobody's once).
fn id(text: &str, file: &str) -> Result<u32> {
    let number = text.parse().ok().filter(|number| *number != u32::MAX);
    number
        .ok_or_else(|| Error::invalid(format!("{file} of the container: {text:?} is not a number of a user or group")))
}

/// The range is Docker's. The largest 32-bit number means "as it was" to setresuid(2).
fn in_range(number: i64, text: &str) -> Result<u32> {
    i32::try_from(number)
        .ok()
        .and_then(|number| u32::try_from(number).ok())
        .ok_or_else(|| Error::invalid(format!("uids and gids must be in range 0-{}, and {text} is not", i32::MAX)))
}

/// The lines of a colon-separated file that have at least `fields` fields.
fn entries(text: &str, fields: usize) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(move |line| line.len() >= fields)
}

/// A file of the image: a regular one, not a pipe or a device, on which reading could block; and bounded. Missing =
/// empty.
fn read(path: &str) -> String {
    let read = || -> sys::SysResult<Vec<u8>> {
        let fd = sys::open(path, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY, 0)?;
        let mut bytes = Vec::new();
        if sys::fstat(fd.raw())?.st_mode & libc::S_IFMT == libc::S_IFREG {
            while bytes.len() < MAX_FILE && sys::read_append(fd.raw(), &mut bytes, 4096)? > 0 {}
        }
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\nann:x:1000:100::/home/ann:/bin/sh\nbob:x:1001:1001:::\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\nwheel:x:10:ann,bob\naudio:x:29:ann\n";

    fn named(text: &str) -> Wanted {
        Wanted::new(Some(&User { username: text.into(), ..Default::default() }), None)
    }

    fn resolve(wanted: &Wanted) -> (u32, u32, Vec<u32>, String) {
        let id = wanted.resolve_in(PASSWD, GROUP).unwrap();
        (id.uid, id.gid, id.groups, id.home)
    }

    #[test]
    fn names_and_numbers_follow_dockers_rules() {
        assert_eq!(resolve(&named("ann")), (1000, 100, vec![100, 10, 29], "/home/ann".into()));
        assert_eq!(resolve(&named("1000")), (1000, 100, vec![100, 10, 29], "/home/ann".into()));
        assert_eq!(resolve(&named("ann:wheel")), (1000, 10, vec![10], "/home/ann".into()));
        assert_eq!(resolve(&named("1000:5")), (1000, 5, vec![5], "/home/ann".into()));
        assert_eq!(resolve(&named("4242")), (4242, 0, vec![0], "/".into()));
        assert_eq!(resolve(&named(":audio")), (0, 29, vec![29], "/root".into()));
        assert_eq!(resolve(&named("bob")).3, "/");
        assert!(named("eve").resolve_in(PASSWD, GROUP).unwrap_err().message.contains("unable to find user eve"));
        assert!(named("ann:nobody").resolve_in(PASSWD, GROUP).is_err());
    }

    #[test]
    fn root_has_its_groups_of_the_image_as_anybody() {
        let group = "root:x:0:root\nbin:x:1:root,bin\nwheel:x:10:root\nann:x:1000:\n";
        assert_eq!(named("0").resolve_in(PASSWD, group).unwrap().groups, [0, 1, 10]);
        // There may be no such files.
        let alone = named("0").resolve_in("", "").unwrap();
        assert_eq!((alone.uid, alone.gid, alone.groups), (0, 0, vec![0]));
    }

    #[test]
    fn what_can_be_a_number_is_one() {
        let passwd = "1000:x:5:5::/five:\n+7:x:8:8::/:\nann:x:1000:100\n";
        let group = "100:x:5:\nusers:x:100\nstaff:x:50:ann\n";
        let found = |text: &str| {
            let id = named(text).resolve_in(passwd, group).unwrap();
            (id.uid, id.gid, id.groups, id.home)
        };
        assert_eq!(found("1000"), (1000, 100, vec![100, 50], "/".into()));
        assert_eq!(found("+7"), (7, 0, vec![0], "/".into()));
        assert_eq!(found("ann:100"), (1000, 100, vec![100], "/".into()));
        for text in ["-1", "2147483648", "4294967295", "ann:-1", "ann:4294967295"] {
            let message = named(text).resolve_in(passwd, group).unwrap_err().message;
            assert!(message.starts_with("uids and gids must be in range 0-2147483647"), "{text}: {message}");
        }
        let nobody = User { uid: u32::MAX, gid: 1, ..Default::default() };
        assert!(Wanted::new(Some(&nobody), None).resolve_in(passwd, group).is_err());
    }

    #[test]
    fn plain_numbers_are_taken_as_they_are() {
        let user = User { uid: 1000, gid: 7, additional_gids: vec![8], ..Default::default() };
        assert_eq!(resolve(&Wanted::new(Some(&user), None)), (1000, 7, vec![8], "/home/ann".into()));
        let text = StringUser { uid: "ann".into(), gid: String::new(), additional_gids: vec!["root".into()] };
        assert_eq!(resolve(&Wanted::new(Some(&user), Some(&text))).2, vec![100, 8, 10, 29, 0]);
        assert_eq!(resolve(&Wanted::new(None, None)), (0, 0, vec![], "/root".into()));
    }

    #[test]
    fn further_groups_have_names() {
        let with = |names: &[&str]| User {
            username: "bob".into(),
            additional_gids: vec![8],
            additional_groups: names.iter().map(|name| (*name).to_string()).collect(),
            ..Default::default()
        };
        let found = |names: &[&str]| Wanted::new(Some(&with(names)), None).resolve_in(PASSWD, GROUP);
        assert_eq!(found(&["audio", "10", "77", "audio"]).unwrap().groups, [1001, 8, 10, 29, 77]);
        assert!(found(&["nosuch"]).unwrap_err().message.contains("unable to find group nosuch"));
    }
}
