//! How connections are encrypted: `sslmode` and `sslrootcert` as libpq means them.
//!
//! tokio-postgres knows three of the six modes and no file of certificates, so both are taken out of the
//! address before it reads that.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::config::Database;
use crate::pipeline::failure::{Error, Result};
use crate::secret::Secret;

/// What a file of certificates is called that stands for those of this machine.
const SYSTEM: &str = "system";

/// What is asked of the encryption, from least to most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// None.
    Disable,
    /// Encrypted if the server can, whoever it is.
    Prefer,
    /// Encrypted, whoever it is; with a file of certificates, as [`Self::VerifyCa`].
    Require,
    /// Vouched for by a known authority, under any name.
    VerifyCa,
    /// Vouched for, under the name that was asked for.
    VerifyFull,
}

impl Mode {
    const ALL: [Self; 5] = [Self::Disable, Self::Prefer, Self::Require, Self::VerifyCa, Self::VerifyFull];

    /// As libpq writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disable => "disable",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        }
    }

    fn read(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| {
            Error::fatal(
                "read database.url",
                format!("sslmode = {text}: use disable, prefer, require, verify-ca or verify-full"),
            )
        })
    }
}

/// An address as tokio-postgres reads it, and how it is to be reached.
#[derive(Clone)]
pub struct Wanted {
    /// The address without what is said of encryption.
    pub config: tokio_postgres::Config,
    /// How much is asked.
    pub mode: Mode,
    /// A file of certificates; none for those of this machine.
    pub root: Option<PathBuf>,
}

impl Wanted {
    /// Reads an address and the settings beside it. What the address says wins.
    pub fn read(url: &Secret, settings: &Database) -> Result<Self> {
        let Parted { rest, sslmode, sslrootcert } = part(url.expose());
        let mut config: tokio_postgres::Config = rest
            .parse()
            // The parser's message names the key at fault, never its value.
            .map_err(|error| Error::fatal("read database.url", super::describe(&error)))?;
        let said = sslmode.as_deref().or(Some(settings.sslmode.as_str()).filter(|mode| !mode.is_empty()));
        let mode = match said {
            Some(text) => Mode::read(text)?,
            None if is_local(&config) => Mode::Disable,
            None => Mode::VerifyFull,
        };
        let root = sslrootcert
            .map(PathBuf::from)
            .or_else(|| Some(settings.sslrootcert.clone()).filter(|path| !path.as_os_str().is_empty()));
        config.ssl_mode(match mode {
            Mode::Disable => SslMode::Disable,
            Mode::Prefer => SslMode::Prefer,
            _ => SslMode::Require,
        });
        Ok(Self { config, mode, root })
    }

    /// What connects in that way.
    pub fn connector(&self) -> Result<MakeRustlsConnect> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let wrong = |message: String| Error::fatal("set encryption up", message);
        let file = self.root.as_ref().filter(|path| path.as_os_str() != SYSTEM);
        // As libpq has it: who gives certificates wants them looked at.
        let mode = match (self.mode, file) {
            (Mode::Require, Some(_)) => Mode::VerifyCa,
            (mode, _) => mode,
        };
        let verifier: Arc<dyn ServerCertVerifier> = if mode <= Mode::Require {
            Arc::new(Anyone(Arc::clone(&provider)))
        } else {
            let known: Arc<dyn ServerCertVerifier> = match file {
                Some(path) => {
                    let store = Arc::new(roots(path)?);
                    WebPkiServerVerifier::builder_with_provider(store, Arc::clone(&provider))
                        .build()
                        .map_err(|error| wrong(error.to_string()))?
                }
                None => Arc::new(
                    rustls_platform_verifier::Verifier::new(Arc::clone(&provider))
                        .map_err(|error| wrong(error.to_string()))?,
                ),
            };
            if mode == Mode::VerifyCa { Arc::new(AnyName(known)) } else { known }
        };
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        Ok(MakeRustlsConnect::new(config))
    }
}

/// Whether every host is this machine, so that nothing leaves it.
fn is_local(config: &tokio_postgres::Config) -> bool {
    config.get_hosts().iter().all(|host| match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
        }
    })
}

/// The certificates of a file.
fn roots(path: &PathBuf) -> Result<RootCertStore> {
    let wrong =
        |message: String| Error::fatal(format!("read database.sslrootcert = {}", path.display()), message);
    let mut store = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
        store.add(certificate).map_err(|error| wrong(error.to_string()))?;
    }
    if store.is_empty() {
        return Err(wrong("there is no certificate in it".into()));
    }
    Ok(store)
}

/// An address and what was taken out of it.
#[derive(Debug, PartialEq, Eq)]
struct Parted {
    rest: String,
    sslmode: Option<String>,
    sslrootcert: Option<String>,
}

/// Takes the two keys out of either form of an address: a URL's query, or pairs of key and value.
fn part(address: &str) -> Parted {
    if address.starts_with("postgres://") || address.starts_with("postgresql://") {
        part_url(address)
    } else {
        part_pairs(address)
    }
}

fn part_url(address: &str) -> Parted {
    let mut parted = Parted { rest: address.into(), sslmode: None, sslrootcert: None };
    // A password's own question mark is percent-encoded.
    let Some((before, query)) = address.split_once('?') else { return parted };
    let mut left = Vec::new();
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match key {
            "sslmode" => parted.sslmode = Some(decoded(value)),
            "sslrootcert" => parted.sslrootcert = Some(decoded(value)),
            _ => left.push(pair),
        }
    }
    parted.rest = if left.is_empty() { before.into() } else { format!("{before}?{}", left.join("&")) };
    parted
}

/// A query's value without its percent signs.
fn decoded(value: &str) -> String {
    percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned()
}

/// Pairs as libpq reads them: blanks around, a value in quotes with backslashes before quotes.
fn part_pairs(address: &str) -> Parted {
    let mut parted = Parted { rest: String::new(), sslmode: None, sslrootcert: None };
    let mut left = address;
    while !left.trim_start().is_empty() {
        left = left.trim_start();
        let Some((key, after)) = left.split_once('=') else {
            // Not a pair: the parser proper says what is wrong.
            if !parted.rest.is_empty() {
                parted.rest.push(' ');
            }
            parted.rest.push_str(left);
            break;
        };
        let after = after.trim_start();
        let length = value_length(after);
        let (raw, next) = after.split_at(length);
        match key.trim() {
            "sslmode" => parted.sslmode = Some(unquoted(raw)),
            "sslrootcert" => parted.sslrootcert = Some(unquoted(raw)),
            _ => {
                if !parted.rest.is_empty() {
                    parted.rest.push(' ');
                }
                parted.rest.push_str(key.trim());
                parted.rest.push('=');
                parted.rest.push_str(raw);
            }
        }
        left = next;
    }
    parted
}

/// How many bytes of the text are its first value, quotes included.
fn value_length(text: &str) -> usize {
    let is_quoted = text.starts_with('\'');
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if is_quoted && c == '\'' && at > 0 {
            return at + 1;
        } else if !is_quoted && c.is_whitespace() {
            return at;
        }
    }
    text.len()
}

fn unquoted(raw: &str) -> String {
    let inner = raw.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')).unwrap_or(raw);
    let mut out = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        out.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    out
}

/// What to do about a failed handshake, if that is what an error is about.
pub(super) fn hint(message: &str) -> Option<&'static str> {
    [
        (
            "UnknownIssuer",
            "nobody known here vouches for the server: set database.sslrootcert to its authority's certificates (for RDS, the bundle that it publishes)",
        ),
        (
            "not valid for name",
            "the server is not who was asked for: is the host in database.url right? sslmode=verify-ca takes any name",
        ),
        ("certificate expired", "the server's certificate has expired, or this machine's clock is wrong"),
        ("invalid peer certificate", "the server's certificate is not to be trusted"),
        (
            "server does not support TLS",
            "the server speaks no TLS: where the network is trusted, set database.sslmode to disable or prefer",
        ),
    ]
    .into_iter()
    .find_map(|(sign, hint)| message.contains(sign).then_some(hint))
}

/// Takes any certificate; the handshake must be by its holder all the same.
struct Anyone(Arc<CryptoProvider>);

/// Takes a certificate that is good but for its name.
struct AnyName(Arc<dyn ServerCertVerifier>);

impl fmt::Debug for Anyone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Anyone")
    }
}

impl fmt::Debug for AnyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AnyName")
    }
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // The name is looked at last, when the chain has been found good.
        match self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::Settings;

    fn parted(rest: &str, sslmode: Option<&str>, sslrootcert: Option<&str>) -> Parted {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Parted { rest: rest.into(), sslmode: owned(sslmode), sslrootcert: owned(sslrootcert) }
    }

    #[test]
    fn both_forms_of_an_address_are_parted_and_the_rest_is_as_it_was() {
        for (address, expected) in [
            ("postgres://u:p@h/d", parted("postgres://u:p@h/d", None, None)),
            (
                "postgresql://u:p@h:5/d?sslmode=verify-full&connect_timeout=3&sslrootcert=%2Fa%20b.pem",
                parted("postgresql://u:p@h:5/d?connect_timeout=3", Some("verify-full"), Some("/a b.pem")),
            ),
            (
                "postgres://u:sslmode%3Dx@h/d?sslmode=require",
                parted("postgres://u:sslmode%3Dx@h/d", Some("require"), None),
            ),
            (
                r"host=h sslmode = 'verify-ca' password='it\'s' dbname=d",
                parted(r"host=h password='it\'s' dbname=d", Some("verify-ca"), None),
            ),
            (
                r"password='a sslmode=disable \' b' sslrootcert=/x\ y host=h",
                parted(r"password='a sslmode=disable \' b' host=h", None, Some("/x y")),
            ),
            ("host=h nonsense", parted("host=h nonsense", None, None)),
            ("", parted("", None, None)),
        ] {
            assert_eq!(part(address), expected, "{address}");
        }
    }

    #[test]
    fn nothing_said_is_verify_full_unless_the_host_is_this_machine() {
        let settings = Settings::load(None, &BTreeMap::new(), &[]).unwrap().database;
        let mode = |url: &str| Wanted::read(&Secret::new(url), &settings).map(|wanted| wanted.mode);
        assert_eq!(mode("postgres://u@db.example.com/d").unwrap(), Mode::VerifyFull);
        for local in
            ["postgres://u@localhost/d", "postgres://u@127.0.0.9/d", "host=/run/x user=u", "host=::1 user=u"]
        {
            assert_eq!(mode(local).unwrap(), Mode::Disable, "{local}");
        }
        assert_eq!(mode("host=/run/x,db.example.com user=u").unwrap(), Mode::VerifyFull);
        assert_eq!(mode("postgres://u@localhost/d?sslmode=require").unwrap(), Mode::Require);
        let error = mode("postgres://u@h/d?sslmode=allow").unwrap_err().to_string();
        assert!(error.contains("sslmode = allow"), "{error}");
        let set = Database { sslmode: "prefer".into(), ..settings };
        assert_eq!(Wanted::read(&Secret::new("host=h user=u"), &set).unwrap().mode, Mode::Prefer);
    }
}
