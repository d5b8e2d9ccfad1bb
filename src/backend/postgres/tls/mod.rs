//! Encryption of connections: `sslmode` and `sslrootcert` with libpq's meaning.
//!
//! tokio-postgres knows three of the six modes and no file of certificates. So both options, and the options
//! of other tools, are removed from the address before tokio-postgres reads it.

mod connection_string;
mod options;
mod verifier;

use std::error::Error as StdError;
use std::path::PathBuf;
use std::sync::{Arc, Once};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{CertificateError, ClientConfig, RootCertStore};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::config::Database;
use crate::pipeline::failure::{Error, FailureKind, Result, causes, chain};
use crate::secret::Secret;
use connection_string::ConnectionString;
use verifier::{AcceptAnyCertificate, IgnoreServerName};

/// The value of `sslrootcert` that stands for the certificates of this machine.
const SYSTEM: &str = "system";

/// What a connection requires, from least to most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// No encryption.
    Disable,
    /// Encryption if the server offers it; the certificate is not checked.
    Prefer,
    /// Encryption; the certificate is not checked. With a file of certificates, the same as
    /// [`Self::VerifyCa`].
    Require,
    /// A certificate of a known authority, for any host name.
    VerifyCa,
    /// A certificate of a known authority, for the host name in the address.
    VerifyFull,
}

impl Mode {
    const ALL: [Self; 5] = [Self::Disable, Self::Prefer, Self::Require, Self::VerifyCa, Self::VerifyFull];

    /// The name in libpq.
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
            Error::new(
                FailureKind::WrongSetting,
                "read database.url",
                format!("sslmode = {text}: use disable, prefer, require, verify-ca or verify-full"),
            )
        })
    }
}

/// An address for tokio-postgres, and the encryption of its connections.
#[derive(Clone)]
pub struct ConnectionSettings {
    /// The address without options of encryption.
    pub config: tokio_postgres::Config,
    /// What a connection requires.
    pub mode: Mode,
    /// A file of certificates; `None`: the certificates of this machine.
    pub root: Option<PathBuf>,
}

impl ConnectionSettings {
    /// Reads an address and the settings. An option in the address overrides a setting.
    pub fn read(url: &Secret, settings: &Database) -> Result<Self> {
        let connection_string = ConnectionString::of(url.expose())?;
        warn_once(&connection_string);
        let ConnectionString { rest, sslmode, sslrootcert, .. } = connection_string;
        let mut config: tokio_postgres::Config = rest
            .parse()
            // The parser's message names the wrong key, never its value.
            .map_err(|error| {
                Error::new(FailureKind::WrongSetting, "read database.url", chain(&error)).because(error)
            })?;
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

    /// The connector with this encryption.
    pub fn connector(&self) -> Result<MakeRustlsConnect> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let wrong = |message: String| Error::new(FailureKind::WrongSetting, "set up encryption", message);
        let file = self.root.as_ref().filter(|path| path.as_os_str() != SYSTEM);
        // As in libpq: whoever gives certificates wants the server's certificate checked.
        let mode = match (self.mode, file) {
            (Mode::Require, Some(_)) => Mode::VerifyCa,
            (mode, _) => mode,
        };
        let verifier: Arc<dyn ServerCertVerifier> = if mode <= Mode::Require {
            Arc::new(AcceptAnyCertificate(Arc::clone(&provider)))
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
            if mode == Mode::VerifyCa { Arc::new(IgnoreServerName(known)) } else { known }
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

/// Warns of ignored options once in a process, since the address is read several times.
fn warn_once(connection_string: &ConnectionString) {
    static LOGGED: Once = Once::new();
    if let Some(warning) = connection_string.warning() {
        LOGGED.call_once(|| tracing::warn!("{warning}"));
    }
}

/// Whether every host is this machine, so that no data leaves the machine.
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
    let wrong = |message: String| {
        Error::new(
            FailureKind::WrongSetting,
            format!("read database.sslrootcert = {}", path.display()),
            message,
        )
    };
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

/// What to do about a failed handshake; `None` if the error is another one.
pub(super) fn hint(error: &tokio_postgres::Error) -> Option<&'static str> {
    let refused = causes(error).find_map(certificate_error);
    Some(match refused {
        Some(CertificateError::UnknownIssuer) => {
            "no known authority signed the server's certificate: set database.sslrootcert to a file with the authority's certificates (for RDS, the bundle that AWS publishes)"
        }
        Some(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }) => {
            "the server's certificate is for another host name: correct the host in database.url, or set sslmode=verify-ca, which accepts any name"
        }
        Some(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "renew the server's certificate, or correct this machine's clock"
        }
        Some(_) => {
            "the server's certificate cannot be trusted: check the certificate and database.sslrootcert"
        }
        None if speaks_no_tls(error) => {
            "the server does not offer TLS: turn TLS on at the server or, if the network is trusted, set database.sslmode to disable or prefer"
        }
        None => return None,
    })
}

/// Why a certificate was refused. An I/O error keeps it inside, and does not give it as its source.
fn certificate_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a CertificateError> {
    let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    let error = inner.map_or(error, |inner| inner as _);
    match error.downcast_ref::<rustls::Error>()? {
        rustls::Error::InvalidCertificate(refused) => Some(refused),
        _ => None,
    }
}

/// Whether the server refused encryption. The driver has no code for that: only its message tells.
fn speaks_no_tls(error: &tokio_postgres::Error) -> bool {
    error.source().is_some_and(|source| source.to_string() == "server does not support TLS")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::Settings;

    #[test]
    fn nothing_said_is_verify_full_unless_the_host_is_this_machine() {
        let settings = Settings::load(None, &BTreeMap::new(), &[]).unwrap().database;
        let mode = |url: &str| {
            ConnectionSettings::read(&Secret::new(url), &settings).map(|connection| connection.mode)
        };
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
        assert_eq!(ConnectionSettings::read(&Secret::new("host=h user=u"), &set).unwrap().mode, Mode::Prefer);
    }
}
