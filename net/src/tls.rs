//! rustls with a party's own key on both ends: RFC 7250 raw public keys, mutual, TLS 1.3 only.
//!
//! There are no certificates and no names: the 32 bytes of the key are the identity, and a [`Policy`] says which
//! keys may connect. Who is *admitted* is decided above, by what the key is known for.
//! Sessions are never resumed, so that the policy is asked at every connection.
use karez_core::key::{PublicKey, SecretKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    ServerConfig, SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::{
        AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use std::{fmt, sync::Arc};

/// Which keys may be on the other end. Weak keys are refused before it is asked.
pub type Policy = Arc<dyn Fn(&PublicKey) -> bool + Send + Sync>;

/// The ALPN name of the gRPC services.
pub const ALPN_CONTROL: &[u8] = b"h2";
/// The ALPN name of artifact transfer.
pub const ALPN_ARTIFACT: &[u8] = b"karez/artifact/1";

/// An Ed25519 `SubjectPublicKeyInfo` is this, then the 32 bytes of the key (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];
/// An Ed25519 PKCS#8 private key (version 1) is this, then the 32 bytes of the seed (RFC 8410).
const PKCS8_PREFIX: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

/// Any strong key.
pub fn anyone() -> Policy {
    Arc::new(|_| true)
}

/// Only this key.
pub fn only(key: PublicKey) -> Policy {
    Arc::new(move |got| *got == key)
}

/// The server's half: asks every client for its key and lets `policy` decide.
pub fn server(secret: &SecretKey, alpn: &[u8], policy: Policy) -> Result<ServerConfig, Error> {
    let provider = provider();
    let identity = identity(secret, &provider)?;
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(KeyVerifier::new(&provider, policy)))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(identity)));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The client's half: presents its own key and lets `policy` decide about the server's.
pub fn client(secret: &SecretKey, alpn: &[u8], policy: Policy) -> Result<ClientConfig, Error> {
    let provider = provider();
    let identity = identity(secret, &provider)?;
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(KeyVerifier::new(&provider, policy)))
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(identity)));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// The key the other end proved to hold, from what the handshake left. Weak keys are an error.
pub fn peer_key(certs: &[CertificateDer<'_>]) -> Result<PublicKey, Error> {
    let der = certs.first().ok_or(Error::NoCertificatesPresented)?;
    let key = der
        .as_ref()
        .strip_prefix(&SPKI_PREFIX)
        .ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
    PublicKey::from_bytes(key)
        .map_err(|_| Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
}

/// Named at every use: rustls has no default when two providers are linked into one program.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn identity(secret: &SecretKey, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>, Error> {
    let pkcs8 = [PKCS8_PREFIX.as_slice(), secret.as_bytes()].concat();
    let key = provider
        .key_provider
        .load_private_key(PrivateKeyDer::Pkcs8(pkcs8.into()))?;
    let spki = [SPKI_PREFIX.as_slice(), &PublicKey::of(secret).0].concat();
    Ok(Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki)], key)))
}

struct KeyVerifier {
    algorithms: WebPkiSupportedAlgorithms,
    policy: Policy,
}

impl KeyVerifier {
    fn new(provider: &CryptoProvider, policy: Policy) -> Self {
        Self {
            algorithms: provider.signature_verification_algorithms,
            policy,
        }
    }

    fn admit(&self, end_entity: &CertificateDer<'_>) -> Result<(), Error> {
        let key = peer_key(std::slice::from_ref(end_entity))?;
        if (self.policy)(&key) {
            Ok(())
        } else {
            Err(Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            ))
        }
    }

    fn signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(cert.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signed, &self.algorithms)
    }
}

impl fmt::Debug for KeyVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyVerifier")
    }
}

fn no_tls12() -> Error {
    Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13)
}

impl ServerCertVerifier for KeyVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.admit(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for KeyVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.admit(end_entity)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(n: u8) -> SecretKey {
        SecretKey::from_bytes(&[n; 32])
    }

    /// Runs a handshake in memory and says what each end thinks of the other.
    fn shake(
        server: ServerConfig,
        client: ClientConfig,
    ) -> (Result<PublicKey, Error>, Result<PublicKey, Error>) {
        let mut s = rustls::ServerConnection::new(Arc::new(server)).unwrap();
        let name = ServerName::try_from("karez").unwrap();
        let mut c = rustls::ClientConnection::new(Arc::new(client), name).unwrap();
        let (mut server_says, mut client_says) = (Ok(()), Ok(()));
        for _ in 0..10 {
            let mut wire = Vec::new();
            while c.wants_write() {
                c.write_tls(&mut wire).unwrap();
            }
            let mut rest = wire.as_slice();
            while !rest.is_empty() {
                s.read_tls(&mut rest).unwrap();
                if let Err(e) = s.process_new_packets() {
                    server_says = Err(e);
                }
            }
            let mut wire = Vec::new();
            while s.wants_write() {
                s.write_tls(&mut wire).unwrap();
            }
            let mut rest = wire.as_slice();
            while !rest.is_empty() {
                c.read_tls(&mut rest).unwrap();
                if let Err(e) = c.process_new_packets() {
                    client_says = Err(e);
                }
            }
        }
        (
            server_says.and_then(|()| peer_key(s.peer_certificates().unwrap_or_default())),
            client_says.and_then(|()| peer_key(c.peer_certificates().unwrap_or_default())),
        )
    }

    #[test]
    fn both_ends_learn_the_other_key() {
        let (a, b) = (secret(1), secret(2));
        let (seen_by_server, seen_by_client) = shake(
            server(&a, b"x", only(PublicKey::of(&b))).unwrap(),
            client(&b, b"x", only(PublicKey::of(&a))).unwrap(),
        );
        assert_eq!(seen_by_server, Ok(PublicKey::of(&b)));
        assert_eq!(seen_by_client, Ok(PublicKey::of(&a)));
    }

    #[test]
    fn wrong_keys_wrong_protocols_and_keyless_clients_are_refused() {
        let (a, b) = (secret(1), secret(2));
        let (_, client_says) = shake(
            server(&a, b"x", anyone()).unwrap(),
            client(&b, b"x", only(PublicKey::of(&b))).unwrap(),
        );
        assert!(client_says.is_err());
        let (server_says, _) = shake(
            server(&a, b"x", only(PublicKey::of(&a))).unwrap(),
            client(&b, b"x", anyone()).unwrap(),
        );
        assert!(server_says.is_err());
        let (server_says, _) = shake(
            server(&a, b"x", anyone()).unwrap(),
            client(&b, b"y", anyone()).unwrap(),
        );
        assert!(server_says.is_err());
        let provider = provider();
        let keyless = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(KeyVerifier::new(&provider, anyone())))
            .with_no_client_auth();
        let (server_says, _) = shake(server(&a, b"x", anyone()).unwrap(), keyless);
        assert!(server_says.is_err());
    }

    #[test]
    fn weak_and_foreign_keys_are_no_identity() {
        let mut weak = SPKI_PREFIX.to_vec();
        weak.extend([1u8; 1]);
        weak.extend([0u8; 31]);
        assert!(peer_key(&[CertificateDer::from(weak)]).is_err());
        assert!(peer_key(&[CertificateDer::from(vec![0x30, 0x82])]).is_err());
        assert!(peer_key(&[]).is_err());
    }
}
