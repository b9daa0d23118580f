//! What operators may do, in one list of words. A route names the permission it needs; roles and the scopes of API tokens are sets of
//! permissions.

use super::{api_tokens::TokenScope, users::Role};

/// What a route lets an operator do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display, strum::EnumString, strum::IntoStaticStr, strum::VariantArray)]
pub enum Permission {
    /// See who one is.
    #[strum(serialize = "account.read")]
    AccountRead,
    /// Manage one's own password, factors, sessions and API tokens.
    #[strum(serialize = "account.manage")]
    AccountManage,
    /// See and end other users' API tokens.
    #[strum(serialize = "api_tokens.manage")]
    ApiTokensManage,
    /// See which devices wait for approval.
    #[strum(serialize = "approvals.read")]
    ApprovalsRead,
    /// Approve and deny devices.
    #[strum(serialize = "approvals.decide")]
    ApprovalsDecide,
    /// See assemblies.
    #[strum(serialize = "assemblies.read")]
    AssembliesRead,
    /// Create, change and delete assemblies.
    #[strum(serialize = "assemblies.edit")]
    AssembliesEdit,
    /// Read the audit.
    #[strum(serialize = "audit.read")]
    AuditRead,
    /// See credentials, without their secrets.
    #[strum(serialize = "credentials.read")]
    CredentialsRead,
    /// Create, change and delete credentials.
    #[strum(serialize = "credentials.edit")]
    CredentialsEdit,
    /// See devices, and ask them for what they do now.
    #[strum(serialize = "devices.read")]
    DevicesRead,
    /// Change what is known of devices.
    #[strum(serialize = "devices.edit")]
    DevicesEdit,
    /// See directories (LDAP, Active Directory).
    #[strum(serialize = "directory.read")]
    DirectoryRead,
    /// Create, change, test and delete directories.
    #[strum(serialize = "directory.edit")]
    DirectoryEdit,
    /// See the state of the engine.
    #[strum(serialize = "engine.read")]
    EngineRead,
    /// See enrollment codes.
    #[strum(serialize = "enrollment_codes.read")]
    EnrollmentCodesRead,
    /// Create and delete enrollment codes.
    #[strum(serialize = "enrollment_codes.edit")]
    EnrollmentCodesEdit,
    /// See how other services are connected.
    #[strum(serialize = "integrations.read")]
    IntegrationsRead,
    /// Connect other services.
    #[strum(serialize = "integrations.edit")]
    IntegrationsEdit,
    /// See jobs, their runs and the output of these.
    #[strum(serialize = "jobs.read")]
    JobsRead,
    /// Create, change and delete jobs and their history.
    #[strum(serialize = "jobs.edit")]
    JobsEdit,
    /// Run things now, again, or no longer.
    #[strum(serialize = "jobs.launch")]
    JobsLaunch,
    /// See whether the secret store is open.
    #[strum(serialize = "secrets.read")]
    SecretsRead,
    /// Change the key of the secret store.
    #[strum(serialize = "secrets.manage")]
    SecretsManage,
    /// See sites.
    #[strum(serialize = "sites.read")]
    SitesRead,
    /// Create, change and delete sites, and move devices between them.
    #[strum(serialize = "sites.edit")]
    SitesEdit,
    /// See users.
    #[strum(serialize = "users.read")]
    UsersRead,
    /// Create, change and delete users.
    #[strum(serialize = "users.edit")]
    UsersEdit,
}

impl Permission {
    /// Its words, as shown: `jobs.edit`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// The scope with which an API token has it; none for what only a signed-in operator may do. Else a token could make itself an
    /// account or rights that outlive it.
    #[must_use]
    pub fn token_scope(self) -> Option<TokenScope> {
        match self {
            Self::AccountManage
            | Self::ApiTokensManage
            | Self::CredentialsEdit
            | Self::DirectoryEdit
            | Self::IntegrationsEdit
            | Self::SecretsManage
            | Self::SecretsRead
            | Self::UsersEdit => None,
            Self::AccountRead
            | Self::ApprovalsRead
            | Self::AssembliesRead
            | Self::AuditRead
            | Self::CredentialsRead
            | Self::DevicesRead
            | Self::DirectoryRead
            | Self::EngineRead
            | Self::EnrollmentCodesRead
            | Self::IntegrationsRead
            | Self::JobsRead
            | Self::SitesRead
            | Self::UsersRead => Some(TokenScope::Read),
            Self::AssembliesEdit => Some(TokenScope::AssembliesWrite),
            Self::ApprovalsDecide | Self::DevicesEdit | Self::EnrollmentCodesEdit => Some(TokenScope::DevicesWrite),
            Self::JobsEdit | Self::JobsLaunch => Some(TokenScope::JobsWrite),
            Self::SitesEdit => Some(TokenScope::SitesWrite),
        }
    }
}

impl serde::Serialize for Permission {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl Role {
    /// Whether a user of this role has a permission; for things of a site, on the sites assigned.
    #[must_use]
    pub fn may(self, permission: Permission) -> bool {
        match self {
            Self::Admin => true,
            Self::User => !matches!(
                permission,
                Permission::ApiTokensManage
                    | Permission::AuditRead
                    | Permission::CredentialsEdit
                    | Permission::DirectoryEdit
                    | Permission::DirectoryRead
                    | Permission::EnrollmentCodesEdit
                    | Permission::EnrollmentCodesRead
                    | Permission::IntegrationsEdit
                    | Permission::IntegrationsRead
                    | Permission::SecretsManage
                    | Permission::SitesEdit
                    | Permission::UsersEdit
                    | Permission::UsersRead
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use strum::VariantArray as _;

    use super::*;

    #[test]
    fn what_only_reads_needs_the_scope_read_and_nothing_else_has_it() {
        for permission in Permission::VARIANTS {
            let reads = permission.as_str().ends_with(".read") && *permission != Permission::SecretsRead;
            assert_eq!(permission.token_scope() == Some(TokenScope::Read), reads, "{permission}");
        }
    }

    #[test]
    fn edit_permissions_come_with_read_permissions() {
        for permission in Permission::VARIANTS {
            let Some((what, _)) = permission.as_str().split_once('.') else { panic!("{permission} has no dot") };
            let Ok(read) = format!("{what}.read").parse::<Permission>() else { continue };
            for role in Role::VARIANTS {
                assert!(!role.may(*permission) || role.may(read), "{permission} without {read}");
            }
        }
    }
}
