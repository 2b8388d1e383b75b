//! Delay and loss on a router, for kernels without netem.
//!
//! Packets that arrive on an interface are queued to this process (`NFQUEUE`), which holds each of them for a while
//! before it decides on it. Only the numbers of the packets are read; the packets stay in the kernel.
//!
//! The module speaks netlink itself. On a kernel without `CONFIG_NFT_QUEUE`, `nft` cannot express the rule, but the
//! kernel supports it: `nft_compat` provides the missing part through `xt_NFQUEUE`, as `iptables-nft` does. The
//! constants are those of `linux/netfilter/*.h`.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind,
        netlink::{NETFILTER, SocketAddrNetlink},
        recv, sendto, socket_with, sockopt,
    },
};

/// Delay and loss of packets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Conditions {
    /// Time for which each packet is held, in each direction that is held.
    pub(super) delay: Duration,
    /// Probability that a packet is dropped, from 0 to 1.
    pub(super) loss: f64,
    /// Seed of the random numbers that choose the dropped packets.
    pub(super) seed: u64,
}

/// Holds packets that arrive on these interfaces until `stop` returns true. `stop` is called at least ten times a
/// second. `ready` is called as soon as no packet gets past.
///
/// It needs `CAP_NET_ADMIN` over the current network namespace. When it ends, even by SIGKILL, all packets pass again.
/// Packets held at that moment are released after a regular end, and lost after a SIGKILL.
///
/// # Errors
/// If the kernel refuses a queue or the rule.
pub(super) fn hold(
    conditions: Conditions,
    interfaces: &[&str],
    ready: impl FnOnce(),
    stop: impl Fn() -> bool,
) -> io::Result<()> {
    let queue = Queue::open(conditions.loss == 0.0)?;
    let rule = divert(interfaces)?;
    ready();
    let mut dice = Dice(conditions.seed);
    let mut held = VecDeque::new();
    let mut due = Vec::new();
    while !stop() {
        queue.wait(held.front().map(|packet: &Held| packet.due))?;
        while let Some(number) = queue.next()? {
            held.push_back(Held {
                number,
                due: Instant::now() + conditions.delay,
                // Lost packets keep their positions, so that the kernel finds every packet at the head of its list.
                lost: dice.roll() < conditions.loss,
            });
        }
        let now = Instant::now();
        let count = held.partition_point(|packet| packet.due <= now);
        due.extend(held.drain(..count));
        queue.release(&due)?;
        due.clear();
    }
    drop(rule);
    queue.release(held.make_contiguous())
}

/// A packet that waits in the kernel.
#[derive(Debug)]
struct Held {
    number: u32,
    due: Instant,
    lost: bool,
}

/// A Splitmix64 generator.
struct Dice(u64);

impl Dice {
    /// Returns a number from 0 to 1, without 1.
    fn roll(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Number of the queue. Every network namespace has its own queues.
const QUEUE: u16 = 0;
/// Most packets in the queue; further ones are lost. Enough for 20 ms of packets of 1200 bytes at 4.8 Gbit/s.
const LENGTH: u32 = 10_000;

/// The process's end of a queue in the kernel.
struct Queue(OwnedFd);

impl Queue {
    /// Opens the queue. With `whole`, packets that offloading has merged on either side stay merged. Otherwise they are
    /// split, because a wire loses packets one by one.
    fn open(whole: bool) -> io::Result<Self> {
        let socket = connect()?;
        // The largest buffer for an unprivileged process. A full buffer loses packets.
        sockopt::set_socket_recv_buffer_size(&socket, 1 << 24)?;
        let flags = if whole { CFG_F_GSO } else { 0 };
        let configuration = [
            attribute(CFG_CMD, &[CMD_BIND, 0, 0, 0]),
            // No packet contents.
            attribute(CFG_PARAMS, &[0, 0, 0, 0, COPY_META]),
            attribute(CFG_QUEUE_MAXLEN, &LENGTH.to_be_bytes()),
            attribute(CFG_MASK, &CFG_F_GSO.to_be_bytes()),
            attribute(CFG_FLAGS, &flags.to_be_bytes()),
        ];
        let kind = QUEUE_CONFIG;
        let message = message(kind, REQUEST | ACK, UNSPEC, QUEUE, &configuration);
        send(&socket, &message)?;
        acknowledged(&socket)?;
        Ok(Self(socket))
    }

    /// Waits until a packet arrives, `due` is reached, or `stop` has to be called again.
    fn wait(&self, due: Option<Instant>) -> io::Result<()> {
        let most = Duration::from_millis(100);
        let timeout = due.map_or(most, |due| {
            due.saturating_duration_since(Instant::now()).min(most)
        });
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the number of the next packet, if one has arrived.
    fn next(&self) -> io::Result<Option<u32>> {
        let mut buffer = [0; 4096];
        loop {
            let length = match recv(&self.0, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((length, _)) => length,
                Err(Errno::AGAIN) => return Ok(None),
                // If the buffer was full, packets are lost.
                Err(Errno::NOBUFS | Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            // Other messages are errors about packets that the kernel has dropped itself, as it does when an interface
            // is removed.
            if let Some(number) = packet_number(&buffer[..length]) {
                return Ok(Some(number));
            }
        }
    }

    /// Releases or drops these packets, which are the oldest ones. A verdict applies to all packets up to its number.
    fn release(&self, packets: &[Held]) -> io::Result<()> {
        let mut verdicts = Vec::new();
        for alike in packets.chunk_by(|one, next| one.lost == next.lost) {
            let Some(last) = alike.last() else { continue };
            let verdict = if last.lost { DROP } else { ACCEPT };
            let header = [verdict.to_be_bytes(), last.number.to_be_bytes()].concat();
            let header = [attribute(VERDICT_HDR, &header)];
            let kind = QUEUE_VERDICT_BATCH;
            verdicts.extend(message(kind, REQUEST, UNSPEC, QUEUE, &header));
        }
        // The kernel accepts many messages at once, but only as many as fit into the socket's buffer.
        for part in verdicts.chunks(VERDICT_SIZE * 1000) {
            send(&self.0, part)?;
        }
        Ok(())
    }
}

/// Queues packets that arrive on these interfaces before any other rule sees them, as long as the socket is open.
/// Packets pass if no process reads the queue.
fn divert(interfaces: &[&str]) -> io::Result<OwnedFd> {
    let chain = b"incoming\0";
    let hook = [
        attribute(HOOK_HOOKNUM, &PREROUTING.to_be_bytes()),
        attribute(HOOK_PRIORITY, &PRIORITY_RAW.to_be_bytes()),
    ];
    let new = REQUEST | CREATE | ACK;
    let mut messages = vec![
        message(BATCH_BEGIN, REQUEST, UNSPEC, NFTABLES, &[]),
        message(
            NEW_TABLE,
            new,
            INET,
            0,
            &[
                attribute(TABLE_NAME, TABLE),
                attribute(TABLE_FLAGS, &TABLE_F_OWNER.to_be_bytes()),
            ],
        ),
        message(
            NEW_CHAIN,
            new,
            INET,
            0,
            &[
                attribute(CHAIN_TABLE, TABLE),
                attribute(CHAIN_NAME, chain),
                nested(CHAIN_HOOK, &hook),
                attribute(CHAIN_TYPE, b"filter\0"),
            ],
        ),
    ];
    for interface in interfaces {
        let mut name = interface.as_bytes().to_vec();
        name.push(0);
        let load = [
            attribute(META_KEY, &META_IIFNAME.to_be_bytes()),
            attribute(META_DREG, &REGISTER.to_be_bytes()),
        ];
        let compare = [
            attribute(CMP_SREG, &REGISTER.to_be_bytes()),
            attribute(CMP_OP, &CMP_EQ.to_be_bytes()),
            nested(CMP_DATA, &[attribute(DATA_VALUE, &name)]),
        ];
        // The third revision of xt_NFQ_info: the first queue, the number of queues, and flags; padded to eight bytes.
        let info = [QUEUE, 1, NFQ_FLAG_BYPASS, 0].map(u16::to_ne_bytes);
        let target = [
            attribute(TARGET_NAME, b"NFQUEUE\0"),
            attribute(TARGET_REV, &3_u32.to_be_bytes()),
            attribute(TARGET_INFO, info.as_flattened()),
        ];
        let expressions = [
            expression(b"meta\0", &load),
            expression(b"cmp\0", &compare),
            expression(b"target\0", &target),
        ];
        let rule = [
            attribute(RULE_TABLE, TABLE),
            attribute(RULE_CHAIN, chain),
            nested(RULE_EXPRESSIONS, &expressions),
        ];
        messages.push(message(NEW_RULE, new | APPEND, INET, 0, &rule));
    }
    let asked = messages.len() - 1;
    messages.push(message(BATCH_END, REQUEST, UNSPEC, NFTABLES, &[]));
    let socket = connect()?;
    send(&socket, &messages.concat())?;
    for _ in 0..asked {
        acknowledged(&socket)?;
    }
    Ok(socket)
}

fn connect() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        flags,
        Some(NETFILTER),
    )?;
    bind(&socket, &SocketAddrNetlink::new(0, 0))?;
    Ok(socket)
}

fn send(socket: &OwnedFd, messages: &[u8]) -> io::Result<()> {
    if !messages.is_empty() {
        let kernel = SocketAddrNetlink::new(0, 0);
        sendto(socket, messages, SendFlags::empty(), &kernel)?;
    }
    Ok(())
}

/// Reads one answer, which the kernel has written before `send` returned.
fn acknowledged(socket: &OwnedFd) -> io::Result<()> {
    let mut buffer = [0; 4096];
    let (length, _) = recv(socket, &mut buffer, RecvFlags::DONTWAIT)?;
    let answer = &buffer[..length];
    let error = match field(answer, KIND).map(u16::from_ne_bytes) {
        Some(ERROR) => field(answer, HEADER).map(i32::from_ne_bytes),
        _ => None,
    };
    match error {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Returns the number of the packet that this message describes, if any.
fn packet_number(message: &[u8]) -> Option<u32> {
    if u16::from_ne_bytes(field(message, KIND)?) != QUEUE_PACKET {
        return None;
    }
    let mut rest = message.get(HEADER + FAMILY_HEADER..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(field(rest, 0)?));
        if u16::from_ne_bytes(field(rest, 2)?) == PACKET_HDR {
            return Some(u32::from_be_bytes(field(rest, 4)?));
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..)?;
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// Returns a netlink message to netfilter. `resource` is the queue's number, or nftables' number for a batch.
fn message(kind: u16, flags: u16, family: u8, resource: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    let attributes = attributes.concat();
    let length = (HEADER + FAMILY_HEADER + attributes.len()) as u32;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and sender are zero: only one request is open at a time.
    message.extend([0; 8]);
    message.extend([family, 0]);
    message.extend(resource.to_be_bytes());
    message.extend(attributes);
    message
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (4 + value.len()) as u16;
    let mut attribute = length.to_ne_bytes().to_vec();
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &attributes.concat())
}

fn expression(name: &[u8], data: &[Vec<u8>]) -> Vec<u8> {
    let parts = [attribute(EXPR_NAME, name), nested(EXPR_DATA, data)];
    nested(LIST_ELEM, &parts)
}

// netlink.h
const HEADER: usize = 16;
/// Position of the message's kind in the header.
const KIND: usize = 4;
const ERROR: u16 = 2;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;

// netfilter/nfnetlink.h, netfilter.h, netfilter_ipv4.h
const FAMILY_HEADER: usize = 4;
const UNSPEC: u8 = 0;
const INET: u8 = 1;
const NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
const PREROUTING: u32 = 0;
const PRIORITY_RAW: i32 = -300;

// netfilter/nfnetlink_queue.h
const QUEUE_PACKET: u16 = 3 << 8;
const QUEUE_CONFIG: u16 = 3 << 8 | 2;
const QUEUE_VERDICT_BATCH: u16 = 3 << 8 | 3;
const PACKET_HDR: u16 = 1;
const VERDICT_HDR: u16 = 2;
const CFG_CMD: u16 = 1;
const CFG_PARAMS: u16 = 2;
const CFG_QUEUE_MAXLEN: u16 = 3;
const CFG_MASK: u16 = 4;
const CFG_FLAGS: u16 = 5;
const CFG_F_GSO: u32 = 1 << 2;
const CMD_BIND: u8 = 1;
const COPY_META: u8 = 1;
/// Size of a message with a verdict.
const VERDICT_SIZE: usize = HEADER + FAMILY_HEADER + 4 + 8;

// netfilter/nf_tables.h, nf_tables_compat.h, xt_NFQUEUE.h
const NEW_TABLE: u16 = NFTABLES << 8;
const NEW_CHAIN: u16 = NFTABLES << 8 | 3;
const NEW_RULE: u16 = NFTABLES << 8 | 6;
const TABLE: &[u8] = b"conditions\0";
const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
/// The table is removed with the socket.
const TABLE_F_OWNER: u32 = 2;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const HOOK_HOOKNUM: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEM: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const REGISTER: u32 = 1;
const META_DREG: u16 = 1;
const META_KEY: u16 = 2;
const META_IIFNAME: u32 = 6;
const CMP_SREG: u16 = 1;
const CMP_OP: u16 = 2;
const CMP_DATA: u16 = 3;
const CMP_EQ: u32 = 0;
const DATA_VALUE: u16 = 1;
const TARGET_NAME: u16 = 1;
const TARGET_REV: u16 = 2;
const TARGET_INFO: u16 = 3;
const NFQ_FLAG_BYPASS: u16 = 1;
