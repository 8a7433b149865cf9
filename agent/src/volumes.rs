//! Volumes that are mounted in the guest: their usage, and growing them.

use crate::fs;
use crate::guest::wait_for;
use crate::prelude::*;
use crate::proto::csi::{
    VolumeCondition, VolumeStatsResponse, VolumeUsage, VOLUME_USAGE_UNIT_BYTES, VOLUME_USAGE_UNIT_INODES,
};
use crate::sys::{self, Errno, Fd};
use crate::uevent::hotplug_timeout_ms;

const EXT4_MAGIC: i64 = 0xef53;
const XFS_MAGIC: i64 = 0x5846_5342;
/// _IOW('f', 16, __u64) of linux/ext4.h: grow to this number of blocks.
const EXT4_IOC_RESIZE_FS: u64 = 0x4008_6610;
/// _IOR('X', 100, struct xfs_fsop_geom_v1) and _IOW('X', 110, struct xfs_growfs_data) of xfs_fs.h.
const XFS_IOC_FSGEOMETRY_V1: u64 = 0x8070_5864;
const XFS_IOC_FSGROWFSDATA: u64 = 0x4010_586e;
const SECTOR: u64 = 512;
/// How long to wait for a new size. It is in a register of the device before its interrupt comes.
const RESIZE_MS: u64 = 2000;

/// The volume at a path of the guest's (GetVolumeStats).
pub fn stats(path: &str) -> Result<VolumeStatsResponse> {
    let volume = open(path, libc::O_PATH)?;
    let found = sys::fstatfs(volume.raw()).with_context(|| format!("ask for the use of {path}"))?;
    let block = found.f_frsize.max(1) as u64;
    let bytes = |blocks: u64| blocks.saturating_mul(block);
    let usage = |total: u64, free: u64, available: u64, unit: i32| VolumeUsage {
        available,
        total,
        used: total.saturating_sub(free),
        unit,
    };
    Ok(VolumeStatsResponse {
        usage: vec![
            usage(bytes(found.f_blocks), bytes(found.f_bfree), bytes(found.f_bavail), VOLUME_USAGE_UNIT_BYTES),
            usage(found.f_files, found.f_ffree, found.f_ffree, VOLUME_USAGE_UNIT_INODES),
        ],
        volume_condition: Some(Box::new(VolumeCondition { abnormal: false, message: String::new() })),
    })
}

/// Grows the file system of the volume at `path` to `size` bytes (ResizeVolume); 0 means as large as its disk. The host
/// has made the disk larger before; the guest may learn of that a moment later.
///
/// # Errors
/// The file system is neither ext4 nor XFS, the disk is too small, or it would have to shrink.
pub fn resize(path: &str, size: u64) -> Result<()> {
    let volume = open(path, libc::O_RDONLY)?;
    let found = sys::fstatfs(volume.raw()).with_context(|| format!("look at {path}"))?;
    let status = sys::fstat(volume.raw()).with_context(|| format!("look at {path}"))?;
    let disk = await_disk(status.st_dev, size)?;
    let size = if size == 0 { disk } else { size };
    match found.f_type {
        EXT4_MAGIC => grow_ext4(&volume, found.f_bsize as u64, size),
        XFS_MAGIC => grow_xfs(&volume, size),
        other => {
            return Err(Error::unimplemented(format!(
                "the volume {path} can be resized with ext4 and XFS, its file system is another (magic {other:#x})"
            )));
        }
    }
    .with_context(|| format!("resize {path} to {size} bytes"))
}

fn open(path: &str, flags: i32) -> Result<Fd> {
    if !path.starts_with('/') {
        return Err(Error::invalid(format!("volume {path:?} is not an absolute path")));
    }
    sys::open(path, flags | libc::O_NOFOLLOW, 0).map_err(|e| match e {
        Errno(libc::ENOENT) => Error::not_found(format!("there is no volume {path} in the guest")),
        e => Error::internal(format!("open the volume {path}: {e}")),
    })
}

/// Waits until the disk with this number holds `size` bytes; how many it holds.
fn await_disk(device: u64, size: u64) -> Result<u64> {
    let file = format!("/sys/dev/block/{}:{}/size", libc::major(device), libc::minor(device));
    let mut last = 0;
    let enough = wait_for(hotplug_timeout_ms().min(RESIZE_MS), || {
        let text = fs::read_to_string(&file)
            .map_err(|e| Error::precondition(format!("the volume lies on no disk of its own: {file}: {e}")))?;
        let sectors: u64 = text.trim().parse().map_err(|_| Error::internal(format!("{file} holds {text:?}")))?;
        last = sectors.saturating_mul(SECTOR);
        Ok((last >= size).then_some(last))
    })?;
    enough.ok_or_else(|| {
        Error::precondition(format!("the disk holds {last} bytes, {size} are wanted: enlarge it on the host first"))
    })
}

fn grow_ext4(volume: &Fd, block: u64, size: u64) -> Result<()> {
    let blocks = size / block.max(1);
    // What statfs calls the total is without the file system's own tables, and so no answer to "is it that large
    // already?". The kernel takes the same number of blocks as a success, a smaller one as EINVAL.
    match sys::ioctl(volume.raw(), EXT4_IOC_RESIZE_FS, &raw const blocks as usize) {
        Ok(_) => Ok(()),
        Err(Errno(libc::EINVAL)) => Err(Error::invalid("ext4 cannot shrink while it is mounted")),
        Err(e) => Err(e.into()),
    }
}

fn grow_xfs(volume: &Fd, size: u64) -> Result<()> {
    // struct xfs_fsop_geom_v1, 112 bytes: blocksize is its first u32, imaxpct its eighth, then datablocks (u64).
    let mut geometry = [0u64; 14];
    sys::ioctl(volume.raw(), XFS_IOC_FSGEOMETRY_V1, geometry.as_mut_ptr() as usize).context("ask for the geometry")?;
    let block = (geometry[0] as u32).max(1);
    let blocks = size / u64::from(block);
    if blocks < geometry[4] {
        return Err(Error::invalid(format!("XFS cannot shrink from {} to {blocks} blocks", geometry[4])));
    }
    // struct xfs_growfs_data: newblocks, imaxpct (as it is).
    let wanted = [blocks, geometry[3] >> 32];
    sys::ioctl(volume.raw(), XFS_IOC_FSGROWFSDATA, wanted.as_ptr() as usize)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::code;
    use crate::test_support::TempDir;

    #[test]
    fn bytes_and_inodes_are_counted() {
        let dir = TempDir::new("volume");
        let found = stats(&dir.0).unwrap();
        let [bytes, inodes] = &found.usage[..] else { panic!() };
        assert_eq!((bytes.unit, inodes.unit), (VOLUME_USAGE_UNIT_BYTES, VOLUME_USAGE_UNIT_INODES));
        assert!(bytes.total > 0 && bytes.used + bytes.available <= bytes.total);
        assert_eq!(stats("/nonexistent/x").unwrap_err().code, code::NOT_FOUND);
        assert_eq!(stats("relative").unwrap_err().code, code::INVALID_ARGUMENT);
    }

    #[test]
    fn what_is_no_disk_is_not_resized() {
        assert_eq!(resize("/proc", 1 << 20).unwrap_err().code, code::FAILED_PRECONDITION);
    }
}
