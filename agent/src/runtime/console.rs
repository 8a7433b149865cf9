//! Terminals: allocated in the container's own devpts, so that their names mean something inside.

use super::{mounts, path};
use crate::prelude::*;
use crate::proto::oci::ConsoleBox;
use crate::sys::{self, Fd, RawFd};

const TIOCSPTLCK: u64 = 0x4004_5431;
const TIOCGPTPEER: u64 = 0x5441;

/// A new terminal: (master, slave). `root` is the container's root directory.
pub fn open(root: RawFd, size: Option<&ConsoleBox>) -> Result<(Fd, Fd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY;
    let ptmx = path::open(root, "/dev/pts/ptmx", libc::O_PATH | libc::O_NOFOLLOW)
        .context("open the container's /dev/pts/ptmx (a terminal needs a devpts mount)")?;
    // The image may have any file there: it is opened only if it is the multiplexer.
    check_multiplexer(&ptmx)?;
    let master = path::open(root, "/dev/pts/ptmx", flags).context("open a pseudo-terminal")?;
    check_multiplexer(&master)?;
    let unlock = 0i32;
    sys::ioctl(master.raw(), TIOCSPTLCK, &raw const unlock as usize).context("unlock the pseudo-terminal")?;
    // By the master, not by name: the name would be looked up in a tree that the container may have shaped.
    let slave = sys::ioctl(master.raw(), TIOCGPTPEER, (flags | libc::O_CLOEXEC) as usize)
        .map(|fd| Fd::from_raw(fd as RawFd))
        .context("open the pseudo-terminal's other end")?;
    if let Some(size) = size {
        resize(master.raw(), size.height, size.width)?;
    }
    Ok((master, slave))
}

fn check_multiplexer(file: &Fd) -> Result<()> {
    let stat = sys::fstat(file.raw()).context("look at /dev/pts/ptmx")?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR || stat.st_rdev != libc::makedev(5, 2) {
        return Err(Error::invalid("/dev/pts/ptmx of the container is not a pseudo-terminal multiplexer"));
    }
    Ok(())
}

/// Sets the window size; the foreground process group gets SIGWINCH.
pub fn resize(master: RawFd, rows: u32, columns: u32) -> Result<()> {
    let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    let size = [clamp(rows), clamp(columns), 0, 0];
    sys::ioctl(master, libc::TIOCSWINSZ, size.as_ptr() as usize).map(drop).context("set the window size")
}

/// Shows the terminal as /dev/console.
pub fn bind_console(root: RawFd, slave: RawFd) -> Result<()> {
    let target = path::make_file(root, "/dev/console").context("make /dev/console")?;
    mounts::bind_fd(slave, target.raw()).context("bind /dev/console")
}

/// Makes it the controlling terminal of the calling session leader.
pub fn control(slave: RawFd) -> Result<()> {
    sys::ioctl(slave, libc::TIOCSCTTY, 0).map(drop).context("take the controlling terminal")
}

/// The character that means end of file, if the terminal is in line mode now.
pub fn end_of_file(master: RawFd) -> Option<u8> {
    // struct termios of the kernel: four u32 of flags, line discipline, 19 control characters.
    let mut termios = [0u8; 36];
    sys::ioctl(master, libc::TCGETS, termios.as_mut_ptr() as usize).ok()?;
    let local = u32::from_ne_bytes([termios[12], termios[13], termios[14], termios[15]]);
    let character = termios[17 + libc::VEOF];
    (local & libc::ICANON != 0 && character != 0).then_some(character)
}
