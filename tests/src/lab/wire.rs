//! Delay and loss between the networks of a lab, and their measurement.
//!
//! The parts that run in the namespace of a router or a machine are this program, started again with a keyword as its
//! first argument.

use std::{
    io::{Read, Write},
    net::{SocketAddr, UdpSocket},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use patchbay::{Device, Lab, Router};
use rustix::process::getppid;

use super::{
    LabError,
    conditions::{self, Conditions},
    flood, siege, unverified,
};

const HOLD: &str = "lab-hold-packets";
const ECHO: &str = "lab-echo-packets";
const MEASURE: &str = "lab-measure-packets";
pub(super) const FLOOD: &str = "lab-flood";
pub(super) const UNVERIFIED: &str = "lab-unverified";
pub(super) const SILENT: &str = "lab-silent-sockets";
pub(super) const IDENTITIES: &str = "lab-identities";

/// Port on which packets are echoed.
const PORT: u16 = 7;

/// Packets of a measurement, and the time between them.
const PACKETS: u32 = 200;
const PACE: Duration = Duration::from_millis(2);

/// Time to wait for the last packets.
const LAST: Duration = Duration::from_millis(500);

/// The distance between a lab's networks.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Distance {
    /// Round trip between two networks.
    pub round_trip: Duration,
    /// Probability that a packet is lost, from 0 to 1.
    pub loss: f64,
}

/// The measured distance between two machines.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// The median round trip.
    pub round_trip: Duration,
    /// The share of round trips that failed, from 0 to 1.
    pub lost: f64,
}

/// If this program was started as a part of a lab, runs that part until it is no longer needed, and returns its exit
/// code. Must be called first in `main` of every program that makes labs.
pub fn be_a_part() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let part = arguments.next()?;
    let rest: Vec<String> = arguments.collect();
    let result = match part.as_str() {
        HOLD => hold(&rest),
        ECHO => echo(),
        MEASURE => measure(&rest),
        UNVERIFIED => unverified::run(&rest),
        SILENT => siege::run(&rest),
        IDENTITIES => siege::run_identities(&rest),
        FLOOD => match &rest[..] {
            [address, seconds] => match seconds.parse() {
                Ok(seconds) => flood::run(address, seconds),
                Err(error) => Err(anyhow::Error::from(error)),
            },
            _ => Err(anyhow::anyhow!("two arguments: an address, seconds")),
        },
        _ => return None,
    };
    Some(match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{part}: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn hold(arguments: &[String]) -> anyhow::Result<()> {
    let [delay, loss, seed, interface] = arguments else {
        anyhow::bail!("four arguments: microseconds, loss, seed, interface");
    };
    let conditions = Conditions {
        delay: Duration::from_micros(delay.parse()?),
        loss: loss.parse()?,
        seed: seed.parse()?,
    };
    let ready = || say("ready");
    // If the parent process was killed, it cannot end this one.
    let parent = getppid();
    conditions::hold(conditions, &[interface], ready, || getppid() != parent)?;
    Ok(())
}

pub(super) fn say(line: &str) {
    let mut output = std::io::stdout();
    // There may be no reader.
    let _ = writeln!(output, "{line}").and_then(|()| output.flush());
}

fn echo() -> anyhow::Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", PORT))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    say("ready");
    let (mut buffer, parent) = ([0; 64], getppid());
    while getppid() == parent {
        if let Ok((size, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&buffer[..size], from)?;
        }
    }
    Ok(())
}

fn measure(arguments: &[String]) -> anyhow::Result<()> {
    let [address] = arguments else {
        anyhow::bail!("one argument: an address");
    };
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(address.parse::<SocketAddr>()?)?;
    let mut sent = Vec::new();
    let mut took = Vec::new();
    let mut receive = |sent: &[Instant], wait: Duration| -> anyhow::Result<()> {
        let until = Instant::now() + wait;
        let mut number = [0; 4];
        while let Some(left) = until
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
        {
            socket.set_read_timeout(Some(left))?;
            if socket.recv(&mut number).is_ok()
                && let Some(begin) = sent.get(u32::from_le_bytes(number) as usize)
            {
                took.push(begin.elapsed());
            }
        }
        Ok(())
    };
    for number in 0..PACKETS {
        sent.push(Instant::now());
        socket.send(&number.to_le_bytes())?;
        receive(&sent, PACE)?;
    }
    receive(&sent, LAST)?;
    took.sort();
    anyhow::ensure!(!took.is_empty(), "nothing came back");
    let lost = 1.0 - took.len() as f64 / f64::from(PACKETS);
    say(&format!("{} {lost}", took[took.len() / 2].as_micros()));
    Ok(())
}

/// A part of a lab in a process of its own, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Part(Child);

impl Part {
    fn new(child: Child) -> Result<Self, LabError> {
        let mut part = Self(child);
        let output = part.0.stdout.as_mut();
        let ready = output.map(|output| output.read_exact(&mut [0; 6]));
        match ready {
            Some(Ok(())) => Ok(part),
            _ => Err(LabError("a part of the lab did not get ready".to_owned())),
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // The process may have ended by itself, and no other error can be handled.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn this_program(arguments: &[String]) -> Result<Command, LabError> {
    let program = std::env::current_exe().map_err(anyhow::Error::from)?;
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::piped());
    Ok(command)
}

/// Puts this distance between all networks of the lab. Every router at the exchange holds incoming packets for half of
/// the round trip.
pub(super) fn set(lab: &Lab, distance: Distance) -> Result<Vec<Part>, LabError> {
    let mut parts = Vec::new();
    if distance == Distance::default() {
        return Ok(parts);
    }
    for (seed, router) in lab.routers().into_iter().enumerate() {
        if !is_outermost(&router) {
            continue;
        }
        let arguments = [
            HOLD.to_owned(),
            (distance.round_trip / 2).as_micros().to_string(),
            distance.loss.to_string(),
            seed.to_string(),
            EXCHANGE.to_owned(),
        ];
        parts.push(Part::new(
            router.spawn_command_sync(this_program(&arguments)?)?,
        )?);
    }
    Ok(parts)
}

/// Name of the interface to the internet exchange.
const EXCHANGE: &str = "ix";

fn is_outermost(router: &Router) -> bool {
    let interfaces = router.interfaces();
    interfaces.iter().any(|i| i.name() == EXCHANGE)
}

/// Measures the path between two machines. The second must have a public IPv4 address.
pub(super) fn between(one: &Device, other: &Device) -> Result<Measured, LabError> {
    let echo = other.spawn_command_sync(this_program(&[ECHO.to_owned()])?)?;
    let _echo = Part::new(echo)?;
    let address = other
        .ip()
        .ok_or_else(|| LabError("the machine to measure has no IPv4 address".to_owned()))?;
    let target = SocketAddr::new(address.into(), PORT).to_string();
    let child = one.spawn_command_sync(this_program(&[MEASURE.to_owned(), target])?)?;
    let output = child.wait_with_output().map_err(anyhow::Error::from)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut numbers = text.split_whitespace();
    let mut next = || numbers.next().and_then(|n| n.parse::<f64>().ok());
    match (next(), next()) {
        (Some(micros), Some(lost)) => Ok(Measured {
            round_trip: Duration::from_secs_f64(micros / 1e6),
            lost,
        }),
        _ => Err(LabError(format!(
            "the distance cannot be measured: {text:?}"
        ))),
    }
}
