//! libp2p's TLS 1.3 handshake with AES-128-GCM preferred.
//!
//! libp2p-tls offers ChaCha20-Poly1305 first and fixes the order, so two of its peers never use the cipher for which
//! common processors have instructions. The certificates and the rules for them are libp2p's own
//! (<https://github.com/libp2p/specs/blob/master/tls/tls.md>), so that every libp2p implementation can be on the other
//! side. Unlike libp2p-tls, this module never writes session keys to `SSLKEYLOGFILE`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use futures::{AsyncRead, AsyncWrite, FutureExt, future::BoxFuture};
use futures_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use libp2p::{
    PeerId,
    core::{
        UpgradeInfo,
        upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade},
    },
    identity::Keypair,
};
use libp2p_tls::certificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as RustlsError,
    ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    time_provider::TimeProvider,
};

/// Most encrypted bytes that are buffered for the socket.
const BUFFER: usize = 256 * 1024;

/// The name under which TLS is negotiated.
pub(crate) const TLS: &str = "/tls/1.0.0";

/// The reason that a TLS configuration could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The certificate could not be generated.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] certificate::GenError),
    /// The self-signed certificate for secure WebSocket could not be generated.
    #[error("cannot make a certificate: {0}")]
    MadeUp(#[from] rcgen::Error),
    /// The cipher suites are not usable for QUIC.
    #[error("cannot configure TLS for QUIC: {0}")]
    Suite(quinn::crypto::rustls::NoInitialCipherSuite),
    /// rustls refused the configuration.
    #[error("cannot configure TLS: {0}")]
    Rustls(#[from] RustlsError),
}

/// The upgrade `/tls/1.0.0`.
#[derive(Clone, Debug)]
pub(crate) struct Tls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Tls {
    pub(crate) fn new(key: &Keypair) -> Result<Self, ConfigError> {
        let provider = Arc::new(CryptoProvider {
            cipher_suites: vec![
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            ..aws_lc_rs::default_provider()
        });
        let versions = &[&rustls::version::TLS13];
        let verifier = Arc::new(Verifier);
        let (certificate, private) = certificate::generate(key)?;
        // Key and certificate are not checked against each other, because webpki does not know libp2p's critical
        // extension.
        let certified = Arc::new(SingleCertAndKey::from(CertifiedKey::new(
            vec![certificate],
            aws_lc_rs::sign::any_ecdsa_type(&private)?,
        )));
        let mut server = ServerConfig::builder_with_details(Arc::clone(&provider), time())
            .with_protocol_versions(versions)?
            .with_client_cert_verifier(verifier.clone())
            .with_cert_resolver(certified.clone());
        let mut client = ClientConfig::builder_with_details(provider, time())
            .with_protocol_versions(versions)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(certified);
        server.alpn_protocols = vec![b"libp2p".to_vec()];
        client.alpn_protocols = vec![b"libp2p".to_vec()];
        Ok(Self {
            server: Arc::new(server),
            client: Arc::new(client),
        })
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }
}

impl UpgradeInfo for Tls {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once(TLS)
    }
}

impl<C> InboundConnectionUpgrade<C> for Tls
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = (PeerId, TlsStream<C>);
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Output>>;

    fn upgrade_inbound(self, socket: C, _: Self::Info) -> Self::Future {
        async move {
            let mut stream = TlsAcceptor::from(self.server).accept(socket).await?;
            stream.get_mut().1.set_buffer_limit(Some(BUFFER));
            let peer = peer_id(stream.get_ref().1.peer_certificates())?;
            Ok((peer, stream.into()))
        }
        .boxed()
    }
}

impl<C> OutboundConnectionUpgrade<C> for Tls
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = (PeerId, TlsStream<C>);
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Output>>;

    fn upgrade_outbound(self, socket: C, _: Self::Info) -> Self::Future {
        async move {
            // An IP address is never sent as a server name. The specification requires that none is sent.
            let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
            let mut stream = TlsConnector::from(self.client)
                .connect(name, socket)
                .await?;
            stream.get_mut().1.set_buffer_limit(Some(BUFFER));
            let peer = peer_id(stream.get_ref().1.peer_certificates())?;
            Ok((peer, stream.into()))
        }
        .boxed()
    }
}

/// Returns the peer whose certificate the remote side has proved to hold.
pub(crate) fn peer_id(certificates: Option<&[CertificateDer<'_>]>) -> io::Result<PeerId> {
    let Some([certificate]) = certificates else {
        return Err(io::Error::other("the peer presented no single certificate"));
    };
    let certificate = certificate::parse(certificate).map_err(io::Error::other)?;
    Ok(certificate.peer_id())
}

/// Accepts exactly one self-signed certificate with libp2p's extension, from either side. The swarm checks that it
/// belongs to the expected peer.
#[derive(Debug)]
struct Verifier;

impl Verifier {
    fn check(end: &CertificateDer<'_>, chain: &[CertificateDer<'_>]) -> Result<(), RustlsError> {
        if !chain.is_empty() {
            return Err(RustlsError::General(
                "a libp2p peer presents exactly one certificate".to_owned(),
            ));
        }
        parse(end).map(drop)
    }

    fn check_signature(
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        parse(certificate)?
            .verify_signature(signature.scheme, message, signature.signature())
            .map_err(|_| RustlsError::InvalidCertificate(CertificateError::BadSignature))?;
        Ok(HandshakeSignatureValid::assertion())
    }

    /// Returns the schemes that [`certificate`] can verify, elliptic curves first as the specification asks.
    fn schemes() -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ED25519,
            SignatureScheme::RSA_PSS_SHA512,
            SignatureScheme::RSA_PSS_SHA384,
            SignatureScheme::RSA_PSS_SHA256,
            SignatureScheme::RSA_PKCS1_SHA512,
            SignatureScheme::RSA_PKCS1_SHA384,
            SignatureScheme::RSA_PKCS1_SHA256,
        ]
    }
}

fn parse<'a>(
    certificate: &'a CertificateDer<'a>,
) -> Result<certificate::P2pCertificate<'a>, RustlsError> {
    certificate::parse(certificate)
        .map_err(|_| RustlsError::InvalidCertificate(CertificateError::BadEncoding))
}

fn no_tls12() -> RustlsError {
    RustlsError::General("libp2p uses TLS 1.3 only".to_owned())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, RustlsError> {
        Self::check(end, chain)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        Self::check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, RustlsError> {
        Self::check(end, chain)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        Self::check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

/// The clock for TLS. rustls's own clock panics at a time before 1970.
#[derive(Debug)]
struct TlsTime;

impl TimeProvider for TlsTime {
    fn current_time(&self) -> Option<UnixTime> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Some(UnixTime::since_unix_epoch(since.unwrap_or_default()))
    }
}

/// Returns the clock for TLS, which accepts any system time.
pub(crate) fn time() -> Arc<dyn TimeProvider> {
    Arc::new(TlsTime)
}

#[cfg(test)]
mod tests {
    use futures::{AsyncReadExt, AsyncWriteExt};
    use rustls::CipherSuite;
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;

    fn pipe() -> (impl AsyncRead + AsyncWrite, impl AsyncRead + AsyncWrite) {
        let (a, b) = tokio::io::duplex(1 << 16);
        (a.compat(), b.compat())
    }

    #[tokio::test]
    async fn both_sides_prove_their_identity_and_agree_on_aes_128() {
        let (client_key, server_key) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let (a, b) = pipe();
        let client = Tls::new(&client_key).unwrap();
        let server = Tls::new(&server_key).unwrap();
        let (client, server) = tokio::join!(
            client.upgrade_outbound(a, "/tls/1.0.0"),
            server.upgrade_inbound(b, "/tls/1.0.0")
        );
        let ((seen_server, mut client), (seen_client, mut server)) =
            (client.unwrap(), server.unwrap());
        assert_eq!(seen_server, server_key.public().to_peer_id());
        assert_eq!(seen_client, client_key.public().to_peer_id());
        let suite = client.get_ref().1.negotiated_cipher_suite().unwrap();
        assert_eq!(suite.suite(), CipherSuite::TLS13_AES_128_GCM_SHA256);
        client.write_all(b"weft").await.unwrap();
        client.close().await.unwrap();
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"weft");
    }

    #[tokio::test]
    async fn stock_libp2p_tls_interoperates_in_both_roles() {
        let (ours, theirs) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let stock = libp2p_tls::Config::new(&theirs).unwrap();
        let (a, b) = pipe();
        let (us, them) = tokio::join!(
            Tls::new(&ours).unwrap().upgrade_outbound(a, "/tls/1.0.0"),
            stock.clone().upgrade_inbound(b, "/tls/1.0.0")
        );
        assert_eq!(us.unwrap().0, theirs.public().to_peer_id());
        assert_eq!(them.unwrap().0, ours.public().to_peer_id());
        let (a, b) = pipe();
        let (us, them) = tokio::join!(
            Tls::new(&ours).unwrap().upgrade_inbound(a, "/tls/1.0.0"),
            stock.upgrade_outbound(b, "/tls/1.0.0")
        );
        assert_eq!(us.unwrap().0, theirs.public().to_peer_id());
        assert_eq!(them.unwrap().0, ours.public().to_peer_id());
    }
}
