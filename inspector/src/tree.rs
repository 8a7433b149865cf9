//! The tree that the layers of an image make when they are applied one upon the other.
//!
//! Nothing is written to a disk for it. Paths lead where they would in a container: a link among the parents of a member
//! is followed within the tree, and `..` stops at its root.
//!
//! Source: OCI image specification, `layer.md`.

use std::collections::HashMap;

pub type Id = u32;
pub const ROOT: Id = 0;
const MAX_LINKS: u32 = 40;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    File,
    Directory,
    Link,
    Character,
    Block,
    Fifo,
    Socket,
}

pub struct Node {
    pub kind: Kind,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub size: u64,
    pub layer: u32,
    /// The newest layer that has put something at or below it.
    pub latest: u32,
    pub target: Vec<u8>,
    pub device: (u32, u32),
    pub capability: Vec<u8>,
    pub children: HashMap<Box<[u8]>, Id>,
    pub names: u32,
}

impl Node {
    pub fn new(kind: Kind, mode: u32, layer: u32) -> Node {
        Node {
            kind,
            mode,
            uid: 0,
            gid: 0,
            size: 0,
            layer,
            latest: layer,
            target: Vec::new(),
            device: (0, 0),
            capability: Vec::new(),
            children: HashMap::new(),
            names: 1,
        }
    }
}

/// Something that a later layer removed or replaced.
pub struct Hidden {
    pub path: Vec<u8>,
    pub id: Id,
    pub by: u32,
}

pub struct Tree {
    pub nodes: Vec<Node>,
    pub hidden: Vec<Hidden>,
}

pub enum Problem {
    /// The path climbs out of the root.
    Escapes,
    /// A parent is a link in circles, or no directory.
    NoWay,
    TooLong,
}

/// The components of a member's name, cleaned lexically.
pub fn clean(name: &[u8]) -> Result<Vec<&[u8]>, Problem> {
    if name.len() > 4096 {
        return Err(Problem::TooLong);
    }
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop().ok_or(Problem::Escapes)?;
            }
            part if part.len() > 255 => return Err(Problem::TooLong),
            part => parts.push(part),
        }
    }
    Ok(parts)
}

impl Default for Tree {
    fn default() -> Self {
        Tree { nodes: vec![Node::new(Kind::Directory, 0o755, 0)], hidden: Vec::new() }
    }
}

impl Tree {
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id as usize]
    }

    pub fn add(&mut self, node: Node) -> Id {
        self.nodes.push(node);
        (self.nodes.len() - 1) as Id
    }

    /// Follow a path; `None` where it leads nowhere. The last component is followed, too, if `last` is set.
    pub fn find(&self, path: &[u8], last: bool) -> Option<Id> {
        self.walk(path, last).and_then(|trail| trail.last().copied())
    }

    fn walk(&self, path: &[u8], last: bool) -> Option<Vec<Id>> {
        let mut trail = vec![ROOT];
        let mut links = 0;
        let mut waiting: Vec<Vec<u8>> =
            path.split(|byte| *byte == b'/').rev().filter(|part| !part.is_empty()).map(<[u8]>::to_vec).collect();
        while let Some(part) = waiting.pop() {
            match part.as_slice() {
                b"." => continue,
                b".." => {
                    if trail.len() > 1 {
                        trail.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let id = *self.node(*trail.last()?).children.get(part.as_slice())?;
            let node = self.node(id);
            if node.kind == Kind::Link && (last || !waiting.is_empty()) {
                links += 1;
                if links > MAX_LINKS || waiting.len() > 4096 {
                    return None;
                }
                if node.target.starts_with(b"/") {
                    trail.truncate(1);
                }
                waiting.extend(
                    node.target.split(|byte| *byte == b'/').rev().filter(|p| !p.is_empty()).map(<[u8]>::to_vec),
                );
                continue;
            }
            trail.push(id);
        }
        Some(trail)
    }

    /// Whether one of a member's parents is a link that the same layer has made: no program that makes archives of
    /// directories writes such a thing.
    pub fn is_through_own_link(&self, parts: &[&[u8]], layer: u32) -> bool {
        let mut at = ROOT;
        for (depth, part) in parts.iter().enumerate() {
            let Some(id) = self.node(at).children.get(*part).copied() else { return false };
            let node = self.node(id);
            if node.kind == Kind::Link {
                if node.layer == layer {
                    return true;
                }
                let Some(id) = self.find(&parts[..=depth].join(&b'/'), true) else { return false };
                at = id;
            } else {
                at = id;
            }
        }
        false
    }

    /// The directory for a member whose parents are `parts`; missing ones are made.
    pub fn directory(&mut self, parts: &[&[u8]], layer: u32) -> Result<Id, Problem> {
        let mut at = ROOT;
        for (depth, part) in parts.iter().enumerate() {
            self.nodes[at as usize].latest = layer;
            let next = match self.node(at).children.get(*part) {
                Some(id) => *id,
                None => {
                    let id = self.add(Node::new(Kind::Directory, 0o755, layer));
                    self.nodes[at as usize].children.insert((*part).into(), id);
                    id
                }
            };
            at = match self.node(next).kind {
                Kind::Directory => next,
                Kind::Link => {
                    let path = parts[..=depth].join(&b'/');
                    let trail = self.walk(&path, true).ok_or(Problem::NoWay)?;
                    let id = *trail.last().ok_or(Problem::NoWay)?;
                    if self.node(id).kind != Kind::Directory {
                        return Err(Problem::NoWay);
                    }
                    for id in trail {
                        self.nodes[id as usize].latest = layer;
                    }
                    id
                }
                _ => return Err(Problem::NoWay),
            };
        }
        self.nodes[at as usize].latest = layer;
        Ok(at)
    }

    /// Take away what has this name, and record what is hidden by that.
    pub fn remove(&mut self, parent: Id, name: &[u8], path: &[u8], layer: u32) -> bool {
        let Some(id) = self.nodes[parent as usize].children.remove(name) else { return false };
        self.hide(id, path.to_vec(), layer);
        true
    }

    /// Take away what lower layers have at a name (a whiteout); what this layer has put below it stays.
    pub fn remove_older(&mut self, parent: Id, name: &[u8], path: &[u8], layer: u32) {
        let Some(id) = self.node(parent).children.get(name).copied() else { return };
        if self.node(id).latest < layer {
            self.remove(parent, name, path, layer);
        } else if self.node(id).kind == Kind::Directory {
            self.clear(id, path, layer);
        }
    }

    /// Take away what lower layers have in a directory (an opaque whiteout), be it below what this layer has made.
    pub fn clear(&mut self, directory: Id, path: &[u8], layer: u32) {
        let mut waiting = vec![(directory, path.to_vec())];
        while let Some((directory, path)) = waiting.pop() {
            let children: Vec<(Box<[u8]>, Id)> =
                self.node(directory).children.iter().map(|(name, id)| (name.clone(), *id)).collect();
            for (name, id) in children {
                let below = [&path, &b"/"[..], &name].concat();
                let node = self.node(id);
                if node.latest < layer {
                    self.remove(directory, &name, &below, layer);
                } else if node.kind == Kind::Directory {
                    waiting.push((id, below));
                }
            }
        }
    }

    fn hide(&mut self, id: Id, path: Vec<u8>, by: u32) {
        let mut waiting = vec![(id, path)];
        while let Some((id, path)) = waiting.pop() {
            let node = &mut self.nodes[id as usize];
            node.names = node.names.saturating_sub(1);
            let children = std::mem::take(&mut node.children);
            for (name, child) in children {
                waiting.push((child, [&path, &b"/"[..], &name].concat()));
            }
            if self.node(id).kind != Kind::Directory {
                self.hidden.push(Hidden { path, id, by });
            }
        }
    }

    /// Call `visit` with each visible node's path, parents before children, names in order.
    pub fn visit(&self, mut visit: impl FnMut(&[u8], Id, &Node)) {
        let mut waiting = vec![(ROOT, Vec::new())];
        while let Some((id, path)) = waiting.pop() {
            let node = self.node(id);
            if id != ROOT {
                visit(&path, id, node);
            }
            let mut children: Vec<_> = node.children.iter().collect();
            children.sort_by(|a, b| b.0.cmp(a.0));
            for (name, child) in children {
                waiting.push((*child, [&path, &b"/"[..], name].concat()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_that_are_links_are_followed_within_the_tree() {
        let mut tree = Tree::default();
        let usr = tree.directory(&[b"usr", b"lib"], 0).ok().unwrap();
        let mut link = Node::new(Kind::Link, 0o777, 0);
        link.target = b"../../usr/lib".to_vec();
        let link = tree.add(link);
        tree.nodes[ROOT as usize].children.insert(b"lib"[..].into(), link);
        assert_eq!(tree.directory(&[b"lib"], 1).ok(), Some(usr));
        assert_eq!(tree.find(b"/lib", true), Some(usr));
        assert_eq!(tree.find(b"/lib", false), Some(link));
        assert!(tree.find(b"/nowhere", true).is_none());
    }

    #[test]
    fn links_in_circles_lead_nowhere() {
        let mut tree = Tree::default();
        for (name, target) in [(b"a", b"b"), (b"b", b"a")] {
            let mut link = Node::new(Kind::Link, 0o777, 0);
            link.target = target.to_vec();
            let id = tree.add(link);
            tree.nodes[ROOT as usize].children.insert(name[..].into(), id);
        }
        assert!(tree.find(b"a/x", true).is_none());
        assert!(tree.directory(&[b"a", b"x"], 0).is_err());
    }

    #[test]
    fn names_are_cleaned() {
        assert!(matches!(clean(b"../../etc/passwd"), Err(Problem::Escapes)));
        assert_eq!(clean(b"./a//b/../c/").ok().unwrap(), [&b"a"[..], b"c"]);
        assert!(matches!(clean(&[b'a'; 256]), Err(Problem::TooLong)));
    }

    #[test]
    fn what_goes_is_hidden() {
        let mut tree = Tree::default();
        let directory = tree.directory(&[b"d"], 0).ok().unwrap();
        let file = tree.add(Node::new(Kind::File, 0o644, 0));
        tree.nodes[directory as usize].children.insert(b"f"[..].into(), file);
        assert!(tree.remove(ROOT, b"d", b"/d", 1));
        assert_eq!(tree.hidden.len(), 1);
        assert_eq!((tree.hidden[0].path.as_slice(), tree.hidden[0].by), (&b"/d/f"[..], 1));
    }

    #[test]
    fn a_whiteout_spares_what_its_own_layer_has() {
        let mut tree = Tree::default();
        for (layer, name) in [(0, b"old"), (1, b"new")] {
            let directory = tree.directory(&[b"d", b"sub"], layer).ok().unwrap();
            let file = tree.add(Node::new(Kind::File, 0o644, layer));
            tree.nodes[directory as usize].children.insert(name[..].into(), file);
        }
        tree.remove_older(ROOT, b"d", b"/d", 1);
        assert!(tree.find(b"/d/sub/new", true).is_some());
        assert!(tree.find(b"/d/sub/old", true).is_none());
        assert_eq!(tree.hidden.len(), 1);
    }
}
