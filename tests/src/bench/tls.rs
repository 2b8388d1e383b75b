//! The baseline of the transport benchmarks: rustls over TCP, blocking, with AES-128-GCM.

use std::{
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::Arc,
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject},
};

use super::{Failure, process::announce};

fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256],
        ..aws_lc_rs::default_provider()
    })
}

/// In the other process: prints its address, and accepts one connection.
pub(super) fn accept() -> Result<StreamOwned<ServerConnection, TcpStream>, Failure> {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let key = PrivatePkcs8KeyDer::from(certified.key_pair.serialize_der());
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.into())?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    // The certificate is on the same line, because the receiver trusts only this one.
    announce(&format!(
        "{port} {}",
        certified.cert.pem().replace('\n', "|")
    ))?;
    let (socket, _) = listener.accept()?;
    socket.set_nodelay(true)?;
    Ok(StreamOwned::new(
        ServerConnection::new(Arc::new(config))?,
        socket,
    ))
}

/// Connects to the address that the other process has printed.
pub(super) fn connect(line: &str) -> Result<StreamOwned<ClientConnection, TcpStream>, Failure> {
    let malformed = || Failure("the provider printed something else".to_owned());
    let (port, pem) = line.trim().split_once(' ').ok_or_else(malformed)?;
    let port: u16 = port.parse().map_err(|_| malformed())?;
    let pem = pem.replace('|', "\n");
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| malformed())?;
    let mut roots = RootCertStore::empty();
    roots.add(certificate)?;
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost")?;
    let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    socket.set_nodelay(true)?;
    Ok(StreamOwned::new(
        ClientConnection::new(Arc::new(config), name)?,
        socket,
    ))
}
