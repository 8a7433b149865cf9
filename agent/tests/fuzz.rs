//! The protocol's parsers against what a hostile host may send: no panic, no endless loop, no growth.
//!
//! A plain `cargo test` gives it a few seconds, `make fuzz-agent MINUTES=10` as long as one likes. Everything follows
//! from a seed, which a failure prints:
//!
//!     FUZZ_SEED=1234 FUZZ_SECONDS=600 cargo test --release --test fuzz -- --nocapture

use kata_agent::proto::codec::Message;
use kata_agent::proto::{agent, agentext, google, health, oci, ttrpc, types};
use kata_agent::server::conn::{Call, Conn, Kind};
use kata_agent::server::frame;
use kata_agent::sys;
use std::time::{Duration, Instant};

/// The slowest that one input may be: far above what any takes, far below for ever.
const TOO_LONG: Duration = Duration::from_secs(10);
const MAX_GROWTH_KIB: u64 = 8 << 10;

/// xorshift64*: quick, and the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    fn one_of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// A length as real ones are: mostly small.
    fn length(&mut self) -> usize {
        let bits = self.below(13);
        self.below(1 << bits)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// Decodes; what can be decoded says the same after it was encoded and decoded again.
fn decode<M: Message>(bytes: &[u8]) {
    if let Ok(message) = M::decode(bytes) {
        let first = message.to_vec();
        let again = M::decode(&first).expect("what the codec wrote cannot be read").to_vec();
        assert!(first == again, "a message changes when it is written and read again");
    }
}

type Decoder = fn(&[u8]);

macro_rules! decoders {
    ($($module:ident: $($name:ident)*;)*) => { &[$($(decode::<$module::$name>),*),*] };
}

/// Everything that comes from the host, and what that is made of.
const DECODERS: &[Decoder] = decoders! {
    agent: CreateContainerRequest StartContainerRequest RemoveContainerRequest ExecProcessRequest SignalProcessRequest
        WaitProcessRequest UpdateContainerRequest StatsContainerRequest WriteStreamRequest ReadStreamRequest
        CloseStdinRequest TtyWinResizeRequest CreateSandboxRequest UpdateInterfaceRequest UpdateRoutesRequest
        UpdateEphemeralMountsRequest AddARPNeighborsRequest SetIPTablesRequest OnlineCPUMemRequest ReseedRandomDevRequest
        GuestDetailsRequest MemHotplugByProbeRequest SetGuestDateTimeRequest Storage Device StringUser CopyFileRequest
        AddSwapRequest AddSwapPathRequest VolumeStatsRequest ResizeVolumeRequest SetPolicyRequest
        GetDiagnosticDataRequest StatsContainerResponse MemAgentMemcgConfig;
    oci: Spec Process Mount Hooks Linux LinuxResources LinuxSeccomp LinuxDevice;
    agentext: StreamPiece SetLogLevelRequest StatFileRequest ListFilesRequest ReadFileRequest WriteFileRequest
        MkdirRequest SymlinkRequest RemoveFileRequest ListProcessesRequest;
    types: Interface Route ARPNeighbor;
    health: CheckRequest;
    google: Any Timestamp Status;
    ttrpc: Request Response;
};

/// Well-formed inputs to begin with: frames with requests that have something in them.
fn corpus(random: &mut Random) -> Vec<Vec<u8>> {
    let text = |random: &mut Random| {
        let length = random.length().min(60);
        String::from_utf8_lossy(&random.bytes(length)).into_owned()
    };
    let storage = agent::Storage {
        driver: "blk".into(),
        source: "05".into(),
        fstype: "erofs".into(),
        options: vec!["ro".into(), text(random)],
        mount_point: "/run/kata-containers/x".into(),
        ..Default::default()
    };
    let spec = oci::Spec {
        process: Some(Box::new(oci::Process { args: vec![text(random)], ..Default::default() })),
        mounts: vec![oci::Mount { destination: "/proc".into(), options: vec![text(random)], ..Default::default() }],
        linux: Some(Box::default()),
        ..Default::default()
    };
    let create = agent::CreateContainerRequest {
        container_id: text(random),
        storages: vec![storage; 2],
        oci: Some(Box::new(spec)),
        ..Default::default()
    };
    let piece = agentext::StreamPiece {
        data: random.bytes(300),
        credit: random.next() as u32,
        target: Some(Box::new(agentext::StreamTarget { container_id: "c".into(), exec_id: text(random), stream: 1 })),
        port: random.next() as u32,
        end: random.below(2) == 1,
        socket: random.below(4) as u32,
        address: random.bytes(4),
        datagram: random.below(4) as u32,
    };
    let payload = random.length();
    let payloads = [create.to_vec(), piece.to_vec(), random.bytes(payload), vec![]];
    let mut inputs = vec![];
    for (number, payload) in payloads.into_iter().enumerate() {
        let request = ttrpc::Request {
            service: text(random),
            method: "CreateContainer".into(),
            payload: payload.clone(),
            timeout_nano: random.next() as i64,
            metadata: vec![ttrpc::KeyValue { key: text(random), value: text(random) }],
        };
        inputs.push(framed(1 + 2 * number as u32, 1, 2, &request.to_vec()));
        inputs.push(framed(random.next() as u32, 3, random.below(8) as u8, &payload));
    }
    inputs
}

fn framed(stream: u32, kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    let mut out = (body.len() as u32).to_be_bytes().to_vec();
    out.extend(stream.to_be_bytes());
    out.extend([kind, flags]);
    out.extend(body);
    out
}

/// One to a few changes of the kinds that parsers fall over.
fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
    const EXTREMES: &[&[u8]] = &[
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\xff\xff\xff\xff\x0f",
        b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80",
        b"\x80\x00",
        b"\xff\xff\xff\xff",
        b"\x00\x40\x00\x01",
        b"\x0b\x0c",
        b"\xc0\x80\xed\xa0\x80",
    ];
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 => bytes.truncate(at),
            3 => {
                let extreme = random.one_of(EXTREMES).to_vec();
                bytes.splice(at..at, extreme);
            }
            4 => {
                let end = at + random.below(bytes.len() - at + 1).min(4096);
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            5 => {
                let end = at + random.below(bytes.len() - at + 1);
                bytes.drain(at..end);
            }
            _ => {
                let length = random.length();
                let noise = random.bytes(length);
                bytes.splice(at..at, noise);
            }
        }
    }
    // A frame whose length is right again gets further.
    if random.below(2) == 0 && bytes.len() >= frame::HEADER {
        let length = ((bytes.len() - frame::HEADER) as u32).to_be_bytes();
        bytes[..4].copy_from_slice(&length);
        bytes[8] = 1 + random.below(3) as u8;
        bytes[9] &= 7;
    }
}

/// Everything that parses what is in a frame.
fn look_into(random: &mut Random, call: &Call) {
    let body = call.body();
    if let Ok(request) = frame::parse_request(body) {
        let _ = frame::parse_write(request.payload);
        let _ = frame::parse_piece(request.payload);
        random.one_of(DECODERS)(request.payload);
    }
    if let Kind::Data { .. } = call.kind {
        let _ = frame::parse_piece(body);
    }
    random.one_of(DECODERS)(body);
    decode::<ttrpc::Request>(body);
}

/// Sends `bytes` through a connection, cut as it comes, and looks at all that comes out.
fn through_a_connection(random: &mut Random, bytes: &[u8]) {
    let (ours, theirs) = sys::socketpair(libc::SOCK_STREAM | libc::SOCK_NONBLOCK).unwrap();
    let mut conn = Conn::new(ours, random.below(2) == 0);
    let mut rest = bytes;
    let mut frames = 0;
    while !rest.is_empty() {
        let size = 1 + random.below(rest.len());
        let Ok(sent) = sys::write(theirs.raw(), &rest[..size]) else { break };
        rest = &rest[sent..];
        conn.notice(libc::EPOLLIN as u32);
        loop {
            match conn.next_call() {
                Ok(Some(call)) => look_into(random, &call),
                Ok(None) => break,
                Err(_) => return,
            }
            frames += 1;
            assert!(frames <= bytes.len() / frame::HEADER, "more frames than there is room for");
        }
        let _ = conn.flush();
    }
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

#[test]
fn parsers_survive_anything() {
    let seed =
        setting("FUZZ_SEED").unwrap_or_else(|| u64::from(std::process::id()).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let seconds = setting("FUZZ_SECONDS").unwrap_or(3);
    // The connection complains about garbage in the log, on standard error: once per connection.
    kata_agent::log::set_output(sys::open("/dev/null", libc::O_WRONLY, 0).unwrap().into_raw());
    println!("FUZZ_SEED={seed} FUZZ_SECONDS={seconds}");
    let mut random = Random(seed.max(1));
    let begun = Instant::now();
    let (warm, end) = (begun + Duration::from_secs(seconds) / 10, begun + Duration::from_secs(seconds));
    let (mut inputs, mut before) = (0u64, 0);
    while Instant::now() < end {
        for input in corpus(&mut random) {
            for _ in 0..16 {
                let mut bytes = input.clone();
                mutate(&mut random, &mut bytes);
                let began = Instant::now();
                for decoder in [random.one_of(DECODERS), random.one_of(DECODERS)] {
                    decoder(&bytes);
                }
                through_a_connection(&mut random, &bytes);
                assert!(began.elapsed() < TOO_LONG, "input {inputs} took {:?}", began.elapsed());
                inputs += 1;
            }
        }
        // The allocator has seen every size by then.
        if before == 0 && Instant::now() >= warm {
            before = resident_kib();
        }
    }
    let after = resident_kib();
    println!("{inputs} inputs, {} decoders, {before} KiB before and {after} KiB after", DECODERS.len());
    assert!(inputs > 100, "too few inputs to say anything");
    assert!(after.saturating_sub(before) < MAX_GROWTH_KIB, "memory has grown from {before} to {after} KiB");
}
