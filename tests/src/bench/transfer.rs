//! One blob from one process to another over loopback, verified, onto disk.
//!
//! Both sides end when the last byte is synced: ours because it says so only then, the other by an explicit sync. Ours includes finding the
//! provider by ticket, connecting, the manifest and the proofs; the other includes connecting and the TLS handshake, and a BLAKE3
//! hash of the stream on the receiver. AES-128-GCM on both.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{PrivatePkcs8KeyDer, ServerName, pem::PemObject},
};
use weft::{Node, Target};

use super::{Failure, Figure, median};

/// Bytes handed to TLS at a time.
const BUFFER: usize = 1 << 20;

/// What the provider process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// A Weft node that has the file.
    Weft,
    /// A TLS server that sends it.
    Rustls,
}

/// Runs both sides in turn and prints the medians.
///
/// # Errors
/// [`Failure`] if a side fails, or what arrives is not what was sent.
pub fn run(size: u64, rounds: usize, folder: &Path, json: bool) -> Result<(), Failure> {
    let folder = tempfile::Builder::new()
        .prefix("weft-bench-")
        .tempdir_in(folder)?;
    let source = folder.path().join("blob.bin");
    let hash = write_blob(&source, size)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds.max(1) {
        let weft = Provider::start(&source, Side::Weft)?;
        ours.push(rate(size, get_by_weft(folder.path(), &weft.line, &hash)?));
        drop(weft);
        let rustls = Provider::start(&source, Side::Rustls)?;
        theirs.push(rate(
            size,
            get_by_rustls(folder.path(), &rustls.line, &hash)?,
        ));
        drop(rustls);
        eprintln!(
            "round {}: weft {:.0} MB/s, rustls {:.0} MB/s",
            round + 1,
            ours[round],
            theirs[round]
        );
    }
    Figure {
        bench: if size == 1 << 30 {
            "transfer-1GiB"
        } else {
            "transfer"
        },
        weft: median(ours),
        unit: "MB/s",
        baseline: "rustls tcp + blake3",
        value: median(theirs),
    }
    .print(json);
    Ok(())
}

/// The other process: provides `file` until standard input ends.
///
/// # Errors
/// [`Failure`] if it cannot.
pub fn provide(file: &Path, side: Side) -> Result<(), Failure> {
    match side {
        Side::Weft => provide_by_weft(file),
        Side::Rustls => provide_by_rustls(file),
    }
}

fn rate(size: u64, elapsed: Duration) -> f64 {
    size as f64 / 1e6 / elapsed.as_secs_f64()
}

/// Bytes that nothing can compress; their hash.
fn write_blob(path: &Path, size: u64) -> Result<blake3::Hash, Failure> {
    let mut file = File::create(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut stream = blake3::Hasher::new().finalize_xof();
    let mut buffer = vec![0; BUFFER];
    let mut left = size;
    while left > 0 {
        let n = left.min(BUFFER as u64) as usize;
        stream.fill(&mut buffer[..n]);
        hasher.update(&buffer[..n]);
        file.write_all(&buffer[..n])?;
        left -= n as u64;
    }
    file.sync_all()?;
    Ok(hasher.finalize())
}

/// The child process, ended when dropped.
struct Provider {
    child: Child,
    /// What it printed: how to reach it.
    line: String,
}

impl Provider {
    fn start(file: &Path, side: Side) -> Result<Self, Failure> {
        let side = side.to_possible_value().expect("no side is skipped");
        let mut child = Command::new(std::env::current_exe()?)
            .arg("transfer-provider")
            .arg(file)
            .arg(side.get_name())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().expect("standard output is captured");
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        let provider = Self { child, line };
        match read {
            Ok(1..) => Ok(provider),
            _ => Err(Failure("the provider did not start".to_owned())),
        }
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        // The end of its input asks it to stop; a second later it is killed.
        drop(self.child.stdin.take());
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(1) {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        // Fails if it has just ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn announce(line: &str) -> Result<(), Failure> {
    println!("{line}");
    std::io::stdout().flush()?;
    Ok(())
}

fn wait_for_end_of_input() -> Result<(), Failure> {
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

async fn node(home: &Path) -> Result<Node, Failure> {
    let listen = "/ip4/127.0.0.1/tcp/0".parse().map_err(weft::Error::from)?;
    let builder = Node::builder().home(home).mdns(false).listen([listen]);
    Ok(builder.spawn().await?)
}

fn provide_by_weft(file: &Path) -> Result<(), Failure> {
    let home = tempfile::tempdir()?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let node = node(home.path()).await?;
        let added = node.models().add(file).start().await?;
        announce(&added.ticket.to_string())?;
        tokio::task::spawn_blocking(wait_for_end_of_input)
            .await
            .map_err(Failure::from)??;
        node.shutdown().await;
        Ok(())
    })
}

fn get_by_weft(folder: &Path, line: &str, hash: &blake3::Hash) -> Result<Duration, Failure> {
    let home = tempfile::tempdir_in(folder)?;
    let target = home.path().join("received");
    let ticket: Target = line.trim().parse().map_err(weft::Error::from)?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime
        .block_on(async {
            let node = node(&home.path().join("home")).await?;
            let begin = Instant::now();
            node.models().get(ticket).to(&target).start().await?;
            let elapsed = begin.elapsed();
            node.shutdown().await;
            Ok::<_, Failure>(elapsed)
        })
        .and_then(|elapsed| {
            check(&target.join("blob.bin"), hash)?;
            Ok(elapsed)
        })
}

fn check(path: &Path, hash: &blake3::Hash) -> Result<(), Failure> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    if hasher.finalize() == *hash {
        Ok(())
    } else {
        Err(Failure("what arrived is not what was sent".to_owned()))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256],
        ..aws_lc_rs::default_provider()
    })
}

fn provide_by_rustls(file: &Path) -> Result<(), Failure> {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let key = PrivatePkcs8KeyDer::from(certified.key_pair.serialize_der());
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.into())?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    // The certificate on the same line: the receiver trusts this one only.
    announce(&format!(
        "{port} {}",
        certified.cert.pem().replace('\n', "|")
    ))?;
    let (socket, _) = listener.accept()?;
    socket.set_nodelay(true)?;
    let mut tls = StreamOwned::new(ServerConnection::new(Arc::new(config))?, socket);
    let mut file = File::open(file)?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        tls.write_all(&buffer[..n])?;
    }
    tls.conn.send_close_notify();
    tls.flush()?;
    wait_for_end_of_input()
}

fn get_by_rustls(folder: &Path, line: &str, hash: &blake3::Hash) -> Result<Duration, Failure> {
    let malformed = || Failure("the provider printed something else".to_owned());
    let (port, pem) = line.trim().split_once(' ').ok_or_else(malformed)?;
    let port: u16 = port.parse().map_err(|_| malformed())?;
    let pem = pem.replace('|', "\n");
    let certificate = rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| malformed())?;
    let mut roots = RootCertStore::empty();
    roots.add(certificate)?;
    let target = folder.join("received.bin");
    let begin = Instant::now();
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost")?;
    let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    socket.set_nodelay(true)?;
    let mut tls = StreamOwned::new(ClientConnection::new(Arc::new(config), name)?, socket);
    let mut file = File::create(&target)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER];
    let mut held = 0;
    loop {
        // TLS gives at most a record at a time: fill the buffer before hashing and writing.
        let n = tls.read(&mut buffer[held..])?;
        held += n;
        if n == 0 || held == BUFFER {
            hasher.update(&buffer[..held]);
            file.write_all(&buffer[..held])?;
            held = 0;
        }
        if n == 0 {
            break;
        }
    }
    file.sync_data()?;
    let elapsed = begin.elapsed();
    let right = hasher.finalize() == *hash;
    fs::remove_file(&target)?;
    if right {
        Ok(elapsed)
    } else {
        Err(Failure("what arrived is not what was sent".to_owned()))
    }
}
