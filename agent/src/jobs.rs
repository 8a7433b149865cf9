//! Slow work in a forked child: the loop goes on meanwhile, and a file system that hangs hangs only the child.

use crate::log;
use crate::poller::{Poller, Token};
use crate::prelude::*;
use crate::server::calls::CallId;
use crate::sys::{self, Errno, Fd, Fork, RawFd};

/// What happens with a job's outcome.
pub enum Completion {
    /// It is the answer to a call.
    Answer(CallId),
    /// What belonged to a container has been removed.
    Removed(String),
    /// Watched directories have been copied.
    Copied,
    /// The last job: answer the call, then end.
    PowerOff(CallId),
}

struct Job {
    pipe: Fd,
    data: Vec<u8>,
    completion: Completion,
}

/// The jobs that run.
#[derive(Default)]
pub struct Jobs {
    running: BTreeMap<u32, Job>,
}

impl Jobs {
    /// Runs `work` in a child, which has no descriptors of the agent's but `keep`; its outcome arrives through the loop.
    pub fn spawn(
        &mut self,
        poller: &mut Poller,
        completion: Completion,
        keep: &[RawFd],
        work: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<()> {
        let (read_end, write_end) = sys::pipe(0).context("make a pipe")?;
        match sys::fork(0, None).context("fork")? {
            Fork::Child => {
                let fd = write_end.into_raw();
                let mut keep = keep.to_vec();
                keep.push(fd);
                sys::close_all_but(keep);
                log::set_output(2);
                let _ = sys::write_all(fd, &pack(work()));
                sys::exit(0)
            }
            Fork::Parent(_) => drop(write_end),
        }
        sys::set_nonblocking(read_end.raw(), true).context("prepare the job's pipe")?;
        let id = poller.fresh_id();
        poller.watch(read_end.raw(), Token::Job(id), libc::EPOLLIN as u32)?;
        self.running.insert(id, Job { pipe: read_end, data: Vec::new(), completion });
        Ok(())
    }

    /// Reads what a job has written. At its end, returns what is to happen with its outcome, and the outcome.
    pub fn read(&mut self, id: u32) -> Option<(Completion, Result<Vec<u8>>)> {
        let job = self.running.get_mut(&id)?;
        loop {
            match sys::read_append(job.pipe.raw(), &mut job.data, 64 << 10) {
                Ok(0) => break,
                Ok(_) => {}
                Err(Errno(libc::EAGAIN)) => return None,
                Err(_) => break,
            }
        }
        let job = self.running.remove(&id)?;
        Some((job.completion, unpack(job.data)))
    }
}

/// A code (0 = good) and the payload or the error's text.
fn pack(outcome: Result<Vec<u8>>) -> Vec<u8> {
    let (code, bytes) = match outcome {
        Ok(payload) => (0, payload),
        Err(e) => (e.code, e.message.into_bytes()),
    };
    let mut packed = code.to_ne_bytes().to_vec();
    packed.extend(bytes);
    packed
}

fn unpack(mut data: Vec<u8>) -> Result<Vec<u8>> {
    let Some(code) = data.first_chunk::<4>().map(|c| i32::from_ne_bytes(*c)) else {
        return Err(Error::internal("the agent's helper was killed (out of memory?)"));
    };
    data.drain(..4);
    if code == 0 {
        Ok(data)
    } else {
        Err(Error::new(code, String::from_utf8_lossy(&data).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_survive_the_pipe() {
        assert_eq!(unpack(pack(Ok(vec![1, 2]))), Ok(vec![1, 2]));
        assert_eq!(unpack(pack(Err(Error::denied("no")))), Err(Error::denied("no")));
        assert!(unpack(vec![]).is_err());
    }
}
