//! Migrations that once read otherwise.
//!
//! Three were edited while the engine was made, before a test kept published ones as they are. A database that ran one in its
//! former wording holds the sum of that, and would be refused for ever. Each was looked at: what is missing is made up for here,
//! and the sum of the present wording is noted.

use super::Pool;
use crate::error::Result;

/// A migration as it was once published.
struct Former {
    version: i64,
    /// SHA-384 of its file, in hex, as sqlx notes it.
    sum: &'static str,
    /// What brings its result to that of the present wording, whatever has run since.
    repair: &'static str,
}

const FORMER: [Former; 3] = [
    // It made the index for pages of devices under another name, where migration 7 does it now.
    Former {
        version: 6,
        sum: "3b46e05458139c34470004e0aa036bd21bb1cf114f48ed69d45ae1eec8443009c43468bced05b4ac29b2a4d0c6cd120a",
        repair: "DO $$ BEGIN
            IF to_regclass('devices_hostname') IS NULL THEN ALTER INDEX devices_page RENAME TO devices_hostname;
            ELSE DROP INDEX IF EXISTS devices_page; END IF;
        END $$",
    },
    // It left that index to migration 6.
    Former {
        version: 7,
        sum: "074074f947d27904860cd35f48efd410da463bcda7ebdcdbc824dc91d6316b196e634eabf7c38941bcf35a8eb86995a0",
        repair: "",
    },
    // It had the defaults that migration 23 sets now.
    Former {
        version: 13,
        sum: "eb86bb03ee0852947f1727a71b51e4a2a2dc5442896b702ade6e0e2f80c278282943e25180b7af2bbb10781a21ba160a",
        repair: "",
    },
];

/// Accepts the former wordings that a database has run. Writes nothing where there are none.
pub(super) async fn accept(pool: &Pool) -> Result<()> {
    let present = super::MIGRATOR.iter().map(|migration| (migration.version, &*migration.checksum));
    let mut tx = pool.begin().await?;
    let exists: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL").fetch_one(&mut *tx).await?;
    if !exists {
        return Ok(());
    }
    for former in FORMER {
        let Some((_, sum)) = present.clone().find(|(version, _)| *version == former.version) else { continue };
        let noted = sqlx::query(
            "UPDATE _sqlx_migrations SET checksum = $3 WHERE version = $1 AND checksum = decode($2, 'hex') AND success",
        )
        .bind(former.version)
        .bind(former.sum)
        .bind(sum)
        .execute(&mut *tx)
        .await?;
        if noted.rows_affected() == 1 {
            tracing::info!(version = former.version, "a migration in its former wording is accepted");
            if !former.repair.is_empty() {
                sqlx::raw_sql(former.repair).execute(&mut *tx).await?;
            }
        }
    }
    tx.commit().await?;
    Ok(())
}
