//! Whom a directory's server must be: what its certificate is checked against, on the very connection that is used.

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicBool, Ordering},
};

use chrono::{DateTime, Utc};
use pem_rfc7468::LineEnding;
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore, SignatureScheme, WantsVerifier,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use sha2::{Digest as _, Sha256};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::{
    egress::CONNECT_LIMIT,
    error::{Error, Kind, Result},
};

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(ring::default_provider()));

/// The authorities this machine trusts. Read once: an engine is restarted when they change.
static SYSTEM: LazyLock<Arc<RootCertStore>> = LazyLock::new(|| {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "some certificate authorities of this machine could not be read");
    }
    roots.add_parsable_certificates(found.certs);
    Arc::new(roots)
});

/// What one connection is checked against, and whether a pin did not fit.
#[derive(Debug, Clone)]
pub struct Trust {
    /// For the TLS library.
    pub config: Arc<ClientConfig>,
    mismatch: Arc<AtomicBool>,
}

impl Trust {
    /// Of a provider's `tls_ca_pem`. With a certificate in it that is no authority, the server must present exactly one of
    /// those (name and chain do not count then, the dates do); with authorities only, one of them must have signed for the
    /// name; without anything, one of the machine's. There is no fourth way: an unchecked server gets no password.
    ///
    /// # Errors
    /// 400 `invalid_certificate`.
    pub fn of(pem: &str) -> Result<Self> {
        let certificates = parse(pem)?;
        let mismatch = Arc::new(AtomicBool::new(false));
        let mut pins = Vec::new();
        for der in &certificates {
            if !is_authority(der)? {
                pins.push(<[u8; 32]>::from(Sha256::digest(der)));
            }
        }
        let config = if !pins.is_empty() {
            Accepted::Pinned { pins, mismatch: mismatch.clone() }.config()?
        } else {
            let roots = if certificates.is_empty() {
                SYSTEM.clone()
            } else {
                let mut roots = RootCertStore::empty();
                for certificate in certificates {
                    roots.add(certificate).map_err(|error| invalid(&error.to_string()))?;
                }
                Arc::new(roots)
            };
            builder()?.with_root_certificates(roots).with_no_client_auth()
        };
        Ok(Self { config: Arc::new(config), mismatch })
    }

    /// Whether the server presented another certificate than the pinned.
    #[must_use]
    pub fn mismatched(&self) -> bool {
        self.mismatch.load(Ordering::Relaxed)
    }
}

fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>> {
    ClientConfig::builder_with_provider(PROVIDER.clone()).with_safe_default_protocol_versions().map_err(Error::bug)
}

fn invalid(why: &str) -> Error {
    Error::field("invalid_certificate", "tls_ca_pem", format!("must hold certificates in PEM form: {why}."))
}

fn parse(pem: &str) -> Result<Vec<CertificateDer<'static>>> {
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().map_err(|error| invalid(&error.to_string()))?;
    if found.is_empty() && !pem.trim().is_empty() {
        return Err(invalid("there is none"));
    }
    Ok(found)
}

fn x509<'a>(der: &'a [u8]) -> Result<X509Certificate<'a>> {
    X509Certificate::from_der(der).map(|(_, certificate)| certificate).map_err(|error| invalid(&error.to_string()))
}

fn is_authority(der: &[u8]) -> Result<bool> {
    let certificate = x509(der)?;
    let constraints = certificate.basic_constraints().map_err(|error| invalid(&error.to_string()))?;
    Ok(constraints.is_some_and(|constraints| constraints.value.ca))
}

/// Which certificates are accepted; neither the signer nor the name in them is checked.
#[derive(Debug)]
enum Accepted {
    /// These, while they are valid.
    Pinned { pins: Vec<[u8; 32]>, mismatch: Arc<AtomicBool> },
    /// Whatever is shown. Only for looking at it: nothing is sent over such a connection.
    Any,
}

impl Accepted {
    fn config(self) -> Result<ClientConfig> {
        Ok(builder()?.dangerous().with_custom_certificate_verifier(Arc::new(self)).with_no_client_auth())
    }
}

impl ServerCertVerifier for Accepted {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Self::Pinned { pins, mismatch } = self else { return Ok(ServerCertVerified::assertion()) };
        if !pins.contains(&Sha256::digest(end_entity).into()) {
            mismatch.store(true, Ordering::Relaxed);
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let certificate = x509(end_entity).map_err(|_| CertificateError::BadEncoding)?;
        let validity = certificate.validity();
        if now < validity.not_before.timestamp() {
            return Err(CertificateError::NotValidYet.into());
        }
        if now > validity.not_after.timestamp() {
            return Err(CertificateError::Expired.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &PROVIDER.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &PROVIDER.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

/// A certificate, for somebody who decides whether to pin it.
#[derive(Debug, Clone)]
pub struct Certificate {
    /// Whom it is for.
    pub subject: String,
    /// Who signed it.
    pub issuer: String,
    /// The common name in the subject, or empty.
    pub common_name: String,
    /// Upper-case hex.
    pub serial_number: String,
    /// SHA-256 of the DER form: upper-case hex, bytes separated by colons.
    pub sha256_fingerprint: String,
    /// From when it counts.
    pub not_before: DateTime<Utc>,
    /// Until when.
    pub not_after: DateTime<Utc>,
    /// The names it is for.
    pub dns_names: Vec<String>,
    /// The addresses it is for.
    pub ip_addresses: Vec<String>,
    /// The whole of it.
    pub pem: String,
}

/// The certificate a server shows for `name`, unchecked.
///
/// # Errors
/// 502 `certificate_download_failed`.
pub async fn download(stream: TcpStream, name: &str) -> Result<Certificate> {
    let failed = |why: Box<dyn std::error::Error + Send + Sync>| {
        let what = "The server did not show a certificate that can be read.";
        let mut error = Error::new(Kind::Upstream, "certificate_download_failed", what);
        error.source = Some(why);
        error
    };
    let config = Accepted::Any.config()?;
    let name = ServerName::try_from(name.to_owned()).map_err(|error| failed(error.into()))?;
    let connected = timeout(CONNECT_LIMIT, TlsConnector::from(Arc::new(config)).connect(name, stream)).await;
    let tls = connected.map_err(|elapsed| failed(elapsed.into()))?.map_err(|error| failed(error.into()))?;
    let shown = tls.get_ref().1.peer_certificates().and_then(|certificates| certificates.first().cloned());
    let der = shown.ok_or_else(|| failed("no certificate".into()))?;
    describe(&der).map_err(|error| failed(error.into()))
}

fn describe(der: &[u8]) -> Result<Certificate> {
    let certificate = x509(der)?;
    let mut dns_names = Vec::new();
    let mut ip_addresses = Vec::new();
    let names = certificate.subject_alternative_name().ok().flatten();
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            GeneralName::DNSName(name) => dns_names.push((*name).to_owned()),
            GeneralName::IPAddress(bytes) => {
                let v4 = <[u8; 4]>::try_from(*bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string());
                let v6 = <[u8; 16]>::try_from(*bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string());
                ip_addresses.extend(v4.or(v6));
            }
            _ => {}
        }
    }
    let date = |seconds| DateTime::from_timestamp(seconds, 0).unwrap_or_default();
    let colons = Sha256::digest(der).iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":");
    Ok(Certificate {
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        common_name: certificate.subject().iter_common_name().find_map(|name| name.as_str().ok()).unwrap_or_default().to_owned(),
        serial_number: hex::encode_upper(certificate.tbs_certificate.raw_serial()),
        sha256_fingerprint: colons,
        not_before: date(certificate.validity.not_before.timestamp()),
        not_after: date(certificate.validity.not_after.timestamp()),
        dns_names,
        ip_addresses,
        pem: pem_rfc7468::encode_string("CERTIFICATE", LineEnding::LF, der).map_err(Error::bug)?,
    })
}
