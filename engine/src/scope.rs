//! Who asks, and which sites they may see. Every store function that reads or changes what belongs to a site takes a
//! [`Scope`] and puts it inside its query, so that out of scope and absent are the same 404.

use crate::quotas::Quotas;

/// The sites a caller may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Everything: an administrator, or the engine itself.
    All,
    /// These sites only; none is nothing at all.
    Sites(Vec<i64>),
}

impl Scope {
    /// The site ids for a query of the form `($1::bigint[] IS NULL OR site_id = ANY($1))`: `None` means no bound.
    /// A device without a site is seen by [`Scope::All`] only, since `NULL = ANY(...)` is not true.
    #[must_use]
    pub fn site_ids(&self) -> Option<&[i64]> {
        match self {
            Self::All => None,
            Self::Sites(ids) => Some(ids),
        }
    }

    /// Whether `site` is inside. No site is inside [`Scope::All`] only.
    #[must_use]
    pub fn contains(&self, site: Option<i64>) -> bool {
        match (self, site) {
            (Self::All, _) => true,
            (Self::Sites(ids), Some(site)) => ids.contains(&site),
            (Self::Sites(_), None) => false,
        }
    }
}

/// Who did something, for the audit and for `requested_by` columns.
#[derive(Debug, Clone, Default)]
pub struct Actor {
    /// `anonymous`, `operator`, `device`, `worker` or `system`.
    pub kind: ActorKind,
    /// The user id, device GUID or worker id, as text.
    pub id: String,
    /// The username or hostname, as text.
    pub name: String,
    /// The client's address, as text.
    pub ip: String,
    /// The session it was done with.
    pub session: Option<uuid::Uuid>,
    /// The API token it was done with, in place of a person at a session.
    pub token: Option<ActorToken>,
}

/// An API token, as the audit names it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct ActorToken {
    /// Its id.
    pub id: uuid::Uuid,
    /// What its owner calls it.
    pub name: String,
}

impl Actor {
    /// The engine itself.
    #[must_use]
    pub fn system() -> Self {
        Self { kind: ActorKind::System, ..Self::default() }
    }

    /// Somebody at the console of a machine of the engine, under this account of the machine.
    #[must_use]
    pub fn console(account: &str) -> Self {
        Self { id: account.to_owned(), name: "console".to_owned(), ..Self::system() }
    }
}

/// A signed-in operator who makes or changes something.
#[derive(Debug, Clone, Copy)]
pub struct Caller<'a> {
    /// The user, who becomes the owner of what is made.
    pub user_id: i64,
    /// The sites the user may see.
    pub scope: &'a Scope,
    /// For the audit.
    pub actor: &'a Actor,
    /// How much a user may own.
    pub quotas: &'a Quotas,
}

impl Caller<'_> {
    /// Whether the user sees everything: an administrator.
    #[must_use]
    pub fn is_admin(&self) -> bool {
        *self.scope == Scope::All
    }
}

/// The kinds of actor; the same set is a CHECK of `audit_events`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum ActorKind {
    /// Nobody we know.
    #[default]
    Anonymous,
    /// A signed-in person.
    Operator,
    /// A managed machine.
    Device,
    /// A worker process.
    Worker,
    /// The engine itself.
    System,
}

impl ActorKind {
    /// The text stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}
