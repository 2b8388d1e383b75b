//! A slow network: TCP connections on loopback, forwarded at a limited rate and counted.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Forwards connections to a port of this machine. Stops when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    to: SocketAddr,
    /// Rate towards the client, in bytes a second.
    rate: AtomicU64,
    /// Bytes forwarded towards the client.
    down: AtomicU64,
    stop: AtomicBool,
}

impl Proxy {
    /// Starts to forward connections to `port`, at `rate` bytes a second towards the client; zero is no limit.
    pub fn start(port: u16, rate: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let shared = Arc::new(Shared {
            to: SocketAddr::from(([127, 0, 0, 1], port)),
            rate: AtomicU64::new(rate),
            down: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let accepting = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                for client in listener.incoming() {
                    if shared.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let (Ok(client), Ok(server)) = (client, TcpStream::connect(shared.to)) else {
                        // If nothing listens there, the client sees its connection closed.
                        continue;
                    };
                    forward(&client, &server, &shared, false);
                    forward(&server, &client, &shared, true);
                }
            })
        };
        Self {
            address,
            shared,
            accepting: Some(accepting),
        }
    }

    /// Returns the port to connect to.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Returns the bytes forwarded towards clients so far.
    pub fn forwarded(&self) -> u64 {
        self.shared.down.load(Ordering::Relaxed)
    }

    /// Waits until this many bytes were forwarded.
    ///
    /// # Panics
    /// If that takes more than a minute.
    pub fn wait_until_forwarded(&self, bytes: u64) {
        let begin = Instant::now();
        while self.forwarded() < bytes {
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "only {} of {bytes} bytes were forwarded",
                self.forwarded()
            );
            thread::park_timeout(Duration::from_millis(5));
        }
    }

    /// Changes the rate; zero is no limit.
    pub fn set_rate(&self, rate: u64) {
        self.shared.rate.store(rate, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts connections. If that fails, the thread has ended.
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn forward(from: &TcpStream, to: &TcpStream, shared: &Arc<Shared>, down: bool) {
    let clone = |stream: &TcpStream| stream.try_clone().expect("a socket can be cloned");
    let (mut from, mut to, shared) = (clone(from), clone(to), Arc::clone(shared));
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        let mut due = Instant::now();
        while let Ok(size @ 1..) = from.read(&mut buffer) {
            if shared.stop.load(Ordering::Relaxed) || to.write_all(&buffer[..size]).is_err() {
                break;
            }
            if !down {
                continue;
            }
            shared.down.fetch_add(size as u64, Ordering::Relaxed);
            let rate = shared.rate.load(Ordering::Relaxed);
            if rate > 0 {
                due = due.max(Instant::now()) + Duration::from_secs_f64(size as f64 / rate as f64);
                // This wait limits the rate.
                thread::park_timeout(due.saturating_duration_since(Instant::now()));
            }
        }
        // Either side may be closed already.
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    });
}
