//! Directories of one container that another one of the same guest sees (CreateContainer.shared_mounts).

use super::path;
use crate::prelude::*;
use crate::sys::{self, Fd, RawFd};

const OPEN_TREE_CLONE: u32 = 1;
const EMPTY_PATH: u32 = libc::AT_EMPTY_PATH as u32;
const RECURSIVE: u32 = libc::AT_RECURSIVE as u32;

/// A shared path, its container resolved: `process` is a pidfd of that container's first process.
pub struct Source {
    pub process: Fd,
    pub path: String,
    pub destination: String,
}

/// A copy of the source's mounts, attached nowhere yet, and where it goes.
pub struct Tree {
    mounts: Fd,
    destination: String,
}

/// Takes the sources out of their containers. The calling process visits their mount namespaces and comes back.
pub fn take(sources: &[Source]) -> Result<Vec<Tree>> {
    if sources.is_empty() {
        return Ok(Vec::new());
    }
    let own = sys::open("/proc/self/ns/mnt", libc::O_RDONLY, 0).context("open the agent's mount namespace")?;
    let mut trees = Vec::new();
    for source in sources {
        // Mounts can only be copied from the caller's own mount namespace. Its root is then the container's.
        sys::setns(source.process.raw(), libc::CLONE_NEWNS).context("enter the other container")?;
        let mounts = copy(&source.path);
        sys::setns(own.raw(), libc::CLONE_NEWNS).context("come back from the other container")?;
        let mounts = mounts.with_context(|| format!("share {:?} of another container", source.path))?;
        trees.push(Tree { mounts, destination: source.destination.clone() });
    }
    Ok(trees)
}

fn copy(source: &str) -> Result<Fd> {
    let root = sys::open("/", libc::O_PATH | libc::O_DIRECTORY, 0)?;
    let found = path::open(root.raw(), source, libc::O_PATH)?;
    Ok(sys::open_tree(found.raw(), "", OPEN_TREE_CLONE | EMPTY_PATH | RECURSIVE)?)
}

/// Puts them into a container's root.
pub fn attach(root: RawFd, trees: &[Tree]) -> Result<()> {
    for tree in trees {
        let put = || -> Result<()> {
            let target = if path::is_dir(&tree.mounts)? {
                path::make_dir(root, &tree.destination, 0o755)?
            } else {
                path::make_file(root, &tree.destination)?
            };
            Ok(sys::move_mount(tree.mounts.raw(), target.raw())?)
        };
        put().with_context(|| format!("shared mount on {:?}", tree.destination))?;
    }
    Ok(())
}
