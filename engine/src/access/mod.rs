//! Who may do what: operators, their sessions and second factors, and the key everything secret is sealed under.

use std::net::IpAddr;

use crate::{
    db, egress,
    scope::{Actor, ActorKind},
    secret::Secret,
};

pub mod aegis;
pub mod api_tokens;
pub mod bootstrap;
pub mod challenges;
pub mod credentials;
pub mod directory;
pub mod github;
pub mod limits;
pub mod mfa;
pub mod passkeys;
pub mod passwords;
pub mod permissions;
pub mod recovery_codes;
pub mod sessions;
pub mod setup_token;
pub mod sign_in;
pub mod users;

/// Settings of sign-in.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long sessions live.
    pub sessions: sessions::Lifetimes,
    /// The name an authenticator app shows. `BOREALIS_MFA_ISSUER`.
    pub mfa_issuer: String,
    /// The name browsers show where a passkey is made. `BOREALIS_PASSKEY_RP_NAME`.
    pub passkey_rp_name: String,
    /// Where directories and the like may be. `BOREALIS_EGRESS_ALLOW`.
    pub egress: egress::Policy,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sessions: sessions::Lifetimes::default(),
            mfa_issuer: "Borealis".to_owned(),
            passkey_rp_name: "Borealis".to_owned(),
            egress: egress::Policy::default(),
        }
    }
}

/// What sign-in works with.
#[derive(Debug, Clone, Copy)]
pub struct Access<'a> {
    /// The database.
    pub pool: &'a db::Pool,
    /// What seals and opens secrets.
    pub vault: &'a aegis::Vault,
    /// Settings.
    pub settings: &'a Settings,
}

/// Who knocks: what is known of a client before it has signed in.
#[derive(Debug, Clone, Default)]
pub struct Client {
    /// Its address, as the connection shows it.
    pub ip: Option<IpAddr>,
    /// Its `User-Agent`.
    pub user_agent: String,
    /// The cookie of a former sign-in from the same browser; proves nothing but that.
    pub device: Option<Secret<String>>,
}

impl Client {
    /// The address as text; empty when unknown.
    #[must_use]
    pub fn ip_text(&self) -> String {
        self.ip.map(|ip| ip.to_canonical().to_string()).unwrap_or_default()
    }

    /// For the audit: nobody we know, from this address.
    #[must_use]
    pub fn anonymous(&self) -> Actor {
        Actor { kind: ActorKind::Anonymous, ip: self.ip_text(), ..Actor::default() }
    }

    /// For the audit: this user, from this address.
    #[must_use]
    pub fn acting_as(&self, user_id: i64, username: &str) -> Actor {
        let (id, name, ip) = (user_id.to_string(), username.to_owned(), self.ip_text());
        Actor { kind: ActorKind::Operator, id, name, ip, ..Actor::default() }
    }
}
