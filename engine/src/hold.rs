//! Holding the engine: while it is held, nothing is scheduled and nothing is dispatched.
//!
//! A restored database does not know what has run since its backup, and would run it again. So the engine's progress is counted, as an
//! *epoch*: in the database and beside it in the state folder of every API process. The database is held when it is behind what a
//! folder or a running process has seen, and when it is not the database it says it is (its dump was restored elsewhere). An
//! administrator can hold it, too. A release is an administrator's word ([`release`]).
//!
//! A promoted standby is the same database on a later timeline and may lack the last moments; it is not held.

use std::{
    fmt, fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::PgConnection;
use strum::VariantArray as _;
use uuid::Uuid;

use crate::{
    Actor,
    audit::{self, Entry},
    db::Pool,
    error::{Error, Result},
    state_dir,
};

/// How often the epoch moves while the engine runs, in seconds.
pub const MOVE_EVERY_S: i32 = 60;
/// How far a promoted standby may be behind: one move that had not reached it.
const STANDBY_BEHIND: i64 = 1;
/// A release goes to the next multiple of this, and so beyond every epoch before it.
const RELEASE_STEP: i64 = 1 << 32;
/// How far ids of activities jump at the release of a restored database: agents know scripts by these ids, and take one they have
/// had for done.
const ID_STEP: i64 = 1_000_000;
/// Is below every epoch: for a process that has seen none.
pub const NO_EPOCH: i64 = 0;
/// Is above every epoch: for a process that may not act yet.
pub const EVERY_EPOCH: i64 = i64::MAX;

/// Why the engine is held; the same set is a CHECK of `engine_epoch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Reason {
    /// An administrator said so.
    Asked,
    /// The database is older than what this engine has done.
    OlderDatabase,
    /// The database says it is another one: a dump of it was restored here.
    OtherDatabase,
}

impl Reason {
    /// The text stored and sent.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Whether the database is a restored one.
    #[must_use]
    pub fn is_restored(self) -> bool {
        self != Self::Asked
    }

    fn parse(text: &str) -> Self {
        Self::VARIANTS.iter().copied().find(|reason| reason.as_str() == text).unwrap_or(Self::Asked)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Asked => "an administrator asked for it",
            Self::OlderDatabase => "the database is older than what this engine has done: it was restored from a backup",
            Self::OtherDatabase => "the database was restored from a backup of another one",
        })
    }
}

/// That the engine is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Since when.
    pub since: DateTime<Utc>,
    /// Why.
    pub reason: Reason,
    /// Who asked for it; empty when nobody did.
    pub by: String,
}

/// What the database says of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The engine, also in a restored database.
    pub engine_id: Uuid,
    /// How far it has come.
    pub epoch: i64,
    /// Whether it is held.
    pub held: Option<Held>,
    /// The highest epoch that a folder had when it was held.
    pub seen_epoch: i64,
    /// Whether the database is the one it says it is.
    pub is_itself: bool,
    /// The timeline of its server; it grows when a standby is promoted.
    pub timeline: i32,
    /// Whether the epoch moved more than [`MOVE_EVERY_S`] ago.
    pub is_due: bool,
    /// Whether there are jobs.
    pub has_jobs: bool,
}

/// How far a process or a folder has seen an engine come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The engine.
    pub engine_id: Uuid,
    /// The highest epoch.
    pub epoch: i64,
    /// The timeline of the server then.
    pub timeline: i32,
}

/// Whether the engine is to be held, given what a process has seen. Pure.
#[must_use]
pub fn judge(record: &Record, seen: Option<Seen>) -> Option<Reason> {
    if let Some(held) = &record.held {
        return Some(held.reason);
    }
    if !record.is_itself {
        return Some(Reason::OtherDatabase);
    }
    let seen = seen?;
    if seen.engine_id != record.engine_id {
        // A new database has nothing to lose.
        return record.has_jobs.then_some(Reason::OtherDatabase);
    }
    let behind = seen.epoch - record.epoch;
    let promoted = record.timeline > seen.timeline && behind <= STANDBY_BEHIND;
    (behind > 0 && !promoted).then_some(Reason::OlderDatabase)
}

/// Reads what the database says of the engine.
///
/// # Errors
/// When the database refuses.
pub async fn record(conn: &mut PgConnection) -> Result<Record> {
    let row = sqlx::query!(
        r#"SELECT engine_id, epoch, seen_epoch, held_since, held_reason, held_by,
                  moved_at <= now() - make_interval(secs => $1::int) AS "is_due!",
                  (system_identifier IS NULL OR (
                      system_identifier = (SELECT c.system_identifier FROM pg_control_system() c)
                      AND database_oid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()))) AS "is_itself!",
                  CASE WHEN pg_is_in_recovery() THEN 0
                       ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END AS "timeline!",
                  EXISTS (SELECT FROM scheduled_jobs) AS "has_jobs!"
           FROM engine_epoch"#,
        MOVE_EVERY_S,
    )
    .fetch_one(conn)
    .await?;
    let held = row.held_since.map(|since| Held {
        since,
        reason: Reason::parse(row.held_reason.as_deref().unwrap_or_default()),
        by: row.held_by,
    });
    Ok(Record {
        engine_id: row.engine_id,
        epoch: row.epoch,
        held,
        seen_epoch: row.seen_epoch,
        is_itself: row.is_itself,
        timeline: row.timeline,
        is_due: row.is_due,
        has_jobs: row.has_jobs,
    })
}

/// Whether a process that has seen `at_least` may act, and the present epoch.
///
/// # Errors
/// When the database refuses.
pub async fn may_act(conn: &mut PgConnection, at_least: i64) -> Result<(bool, i64)> {
    let row =
        sqlx::query!(r#"SELECT engine_may_act($1) AS "may_act!", epoch FROM engine_epoch"#, at_least).fetch_one(conn).await?;
    Ok((row.may_act, row.epoch))
}

/// What an API process knows of the engine now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The highest epoch seen. Its statements act on no database that is behind; [`EVERY_EPOCH`] until the database was judged and
    /// while the engine is held.
    pub at_least: i64,
    /// Whether it is held.
    pub held: Option<Held>,
}

/// An API process's watch over the epoch: moves it, keeps it in the state folder, and holds the engine where the database is behind.
#[derive(Debug)]
pub struct Guard {
    file: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    standing: Standing,
    seen: Option<Seen>,
    /// Whether this start was counted.
    counted: bool,
}

impl Guard {
    /// For the process that runs on `state_dir`.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        let standing = Standing { at_least: EVERY_EPOCH, held: None };
        Self { file: state_dir.join("epoch"), inner: Mutex::new(Inner { standing, seen: None, counted: false }) }
    }

    /// What this process knows.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).standing.clone()
    }

    /// The epoch its statements ask for.
    #[must_use]
    pub fn at_least(&self) -> i64 {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).standing.at_least
    }

    /// Looks at the database: judges it, holds the engine if need be, and moves the epoch when its time has come. To be called every
    /// second. Answers what is true now.
    ///
    /// # Errors
    /// When the database refuses, or the file in the state folder cannot be read.
    pub async fn look(&self, pool: &Pool) -> Result<Standing> {
        let (counted, remembered) = {
            let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            (inner.counted, inner.seen)
        };
        let mut tx = pool.begin().await?;
        let mut now = record(&mut tx).await?;
        // Another process of this machine may have written it.
        let seen = highest(remembered, read(&self.file)?);
        match judge(&now, seen) {
            Some(reason) => {
                let ahead = seen.map_or(0, |seen| seen.epoch).max(now.epoch);
                hold(&mut tx, &mut now, reason, ahead, &Actor::system()).await?;
                tx.commit().await?;
                self.settle(|inner| inner.standing = Standing { at_least: EVERY_EPOCH, held: now.held.clone() });
            }
            None => {
                if !counted || now.is_due {
                    now.epoch = step(&mut tx, counted).await?.unwrap_or(now.epoch);
                }
                tx.commit().await?;
                let seen = Seen { engine_id: now.engine_id, epoch: now.epoch, timeline: now.timeline };
                self.settle(|inner| {
                    inner.standing = Standing { at_least: seen.epoch, held: None };
                    (inner.seen, inner.counted) = (Some(seen), true);
                });
                if read(&self.file)?.is_none_or(|kept| is_news(seen, kept)) {
                    let file = self.file.clone();
                    tokio::task::spawn_blocking(move || write(&file, seen)).await.map_err(Error::bug)??;
                }
            }
        }
        Ok(self.standing())
    }

    fn settle(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The higher one of two that know the same engine, else the first.
fn highest(one: Option<Seen>, other: Option<Seen>) -> Option<Seen> {
    match (one, other) {
        (Some(one), Some(other)) if one.engine_id == other.engine_id && other.epoch > one.epoch => Some(other),
        (one, other) => one.or(other),
    }
}

/// Whether the file is to be written, given what it has.
fn is_news(seen: Seen, kept: Seen) -> bool {
    seen.engine_id != kept.engine_id || seen.epoch > kept.epoch || seen.timeline > kept.timeline
}

/// Moves the epoch, for a start or, when `counted`, for a minute that nobody else has counted.
async fn step(conn: &mut PgConnection, counted: bool) -> Result<Option<i64>> {
    Ok(sqlx::query_scalar!(
        "UPDATE engine_epoch SET epoch = epoch + 1, moved_at = now(),
             system_identifier = (SELECT c.system_identifier FROM pg_control_system() c),
             database_oid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
         WHERE held_since IS NULL AND (NOT $1 OR moved_at <= now() - make_interval(secs => $2::int)) RETURNING epoch",
        counted,
        MOVE_EVERY_S,
    )
    .fetch_optional(conn)
    .await?)
}

/// Holds the engine, if it is not held, and keeps how far a folder has seen it come.
async fn hold(conn: &mut PgConnection, record: &mut Record, reason: Reason, seen_epoch: i64, actor: &Actor) -> Result<bool> {
    if record.held.is_some() && seen_epoch <= record.seen_epoch {
        return Ok(false);
    }
    let by = if actor.id.is_empty() { String::new() } else { format!("{} {}", actor.name, actor.id) };
    let row = sqlx::query!(
        r#"UPDATE engine_epoch SET held_since = coalesce(held_since, now()), held_reason = coalesce(held_reason, $1),
               held_by = CASE WHEN held_since IS NULL THEN $2 ELSE held_by END, seen_epoch = greatest(seen_epoch, $3)
           RETURNING held_since AS "since!", held_reason AS "reason!", held_by"#,
        reason.as_str(),
        by,
        seen_epoch,
    )
    .fetch_one(&mut *conn)
    .await?;
    let begins = record.held.is_none();
    record.held = Some(Held { since: row.since, reason: Reason::parse(&row.reason), by: row.held_by });
    if begins {
        let detail = json!({"reason": reason.as_str(), "epoch": record.epoch, "seen_epoch": seen_epoch});
        let entry = Entry { action: "engine.hold", object_kind: "engine", detail, ..Entry::default() };
        audit::record(conn, actor, entry).await?;
    }
    Ok(begins)
}

/// Holds the engine because an administrator asks for it. Answers false when it is held already.
///
/// # Errors
/// When the database refuses.
pub async fn ask(conn: &mut PgConnection, actor: &Actor) -> Result<bool> {
    let mut now = record(conn).await?;
    let seen_epoch = now.epoch;
    if now.held.is_some() {
        return Ok(false);
    }
    hold(conn, &mut now, Reason::Asked, seen_epoch, actor).await
}

/// What goes on when the engine is released, besides due jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Scripts that are sent to their devices as soon as these are connected.
    pub scripts: i64,
    /// Workflow runs that have not ended.
    pub workflow_runs: i64,
}

/// Counts what waits for a release.
///
/// # Errors
/// When the database refuses.
pub async fn waiting(conn: &mut PgConnection) -> Result<Waiting> {
    Ok(sqlx::query_as!(
        Waiting,
        r#"SELECT (SELECT count(*) FROM activity_history WHERE delivery = 'ready' AND cancel_requested_at IS NULL
                       AND (deliver_until IS NULL OR deliver_until > now())) AS "scripts!",
                  (SELECT count(*) FROM workflow_runs WHERE state IN ('pending', 'running', 'waiting', 'cancelling')) AS "workflow_runs!""#
    )
    .fetch_one(conn)
    .await?)
}

/// Releases the engine: from the commit on it acts, on this database. `state_dir` is that of the console. Ids of activities jump where
/// the database is a restored one. With `skip_missed`, scripts of a restored database that wait for their devices are not sent any more;
/// due jobs are the caller's to skip, before. Answers why it was held.
///
/// # Errors
/// 409 `not_held`; when the file in the state folder cannot be read, or the database refuses.
pub async fn release(conn: &mut PgConnection, actor: &Actor, state_dir: &Path, skip_missed: bool) -> Result<Held> {
    let now = record(conn).await?;
    let Some(held) = now.held else { return Err(Error::conflict("not_held", "The engine is not held.")) };
    let folder = read(&state_dir.join("epoch"))?.filter(|seen| seen.engine_id == now.engine_id).map_or(0, |seen| seen.epoch);
    let highest = now.epoch.max(now.seen_epoch).max(folder);
    let epoch = (highest / RELEASE_STEP + 1) * RELEASE_STEP;
    let mut not_sent = 0;
    if held.reason.is_restored() {
        sqlx::query!(
            "SELECT setval(pg_get_serial_sequence('activity_history', 'id'), (SELECT coalesce(max(id), 0) FROM activity_history) + $1)",
            ID_STEP,
        )
        .fetch_one(&mut *conn)
        .await?;
        if skip_missed {
            not_sent = sqlx::query!(
                "UPDATE activity_history SET deliver_until = now(), updated_at = now()
                 WHERE delivery = 'ready' AND created_at < $1 AND (deliver_until IS NULL OR deliver_until > now())",
                held.since,
            )
            .execute(&mut *conn)
            .await?
            .rows_affected();
        }
    }
    sqlx::query!(
        "UPDATE engine_epoch SET held_since = NULL, held_reason = NULL, held_by = '', seen_epoch = 0, epoch = $1, moved_at = now(),
             system_identifier = (SELECT c.system_identifier FROM pg_control_system() c),
             database_oid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())",
        epoch,
    )
    .execute(&mut *conn)
    .await?;
    let detail = json!({"reason": held.reason.as_str(), "since": held.since, "skip_missed": skip_missed, "not_sent": not_sent});
    let entry = Entry { action: "engine.release", object_kind: "engine", detail, ..Entry::default() };
    audit::record(conn, actor, entry).await?;
    Ok(held)
}

fn read(file: &Path) -> Result<Option<Seen>> {
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(state_dir::unusable(file, error)),
    };
    serde_json::from_str(&text).map(Some).map_err(|error| {
        let why = format!("{error}; nothing is scheduled before it is mended or removed");
        state_dir::unusable(file, std::io::Error::new(std::io::ErrorKind::InvalidData, why))
    })
}

/// Writes the file as a whole or not at all.
fn write(file: &Path, seen: Seen) -> Result<()> {
    let failed = |error| state_dir::unusable(file, error);
    let new = file.with_extension(format!("new.{}", std::process::id()));
    let text = serde_json::to_string(&seen)? + "\n";
    let mut open = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new).map_err(failed)?;
    open.write_all(text.as_bytes()).and_then(|()| open.sync_all()).map_err(failed)?;
    fs::rename(&new, file).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(epoch: i64) -> Record {
        Record {
            engine_id: Uuid::from_u128(1),
            epoch,
            held: None,
            seen_epoch: 0,
            is_itself: true,
            timeline: 3,
            is_due: false,
            has_jobs: true,
        }
    }

    fn seen(epoch: i64) -> Option<Seen> {
        Some(Seen { engine_id: Uuid::from_u128(1), epoch, timeline: 3 })
    }

    #[test]
    fn a_database_that_is_behind_or_another_one_is_held() {
        assert_eq!(judge(&record(7), None), None, "a folder that knows nothing");
        assert_eq!(judge(&record(7), seen(7)), None);
        assert_eq!(judge(&record(8), seen(7)), None, "another process has moved it");
        assert_eq!(judge(&record(6), seen(7)), Some(Reason::OlderDatabase));
        assert_eq!(judge(&Record { is_itself: false, ..record(7) }, seen(7)), Some(Reason::OtherDatabase));
        assert_eq!(judge(&Record { is_itself: false, ..record(7) }, None), Some(Reason::OtherDatabase));
        let held = Held { since: Utc::now(), reason: Reason::Asked, by: String::new() };
        assert_eq!(judge(&Record { held: Some(held), ..record(7) }, None), Some(Reason::Asked));
        let another = Seen { engine_id: Uuid::from_u128(2), epoch: 1, timeline: 1 };
        assert_eq!(judge(&record(7), Some(another)), Some(Reason::OtherDatabase), "the folder of another engine");
        assert_eq!(judge(&Record { has_jobs: false, ..record(7) }, Some(another)), None, "a new database has nothing to lose");
    }

    #[test]
    fn a_promoted_standby_is_not_held() {
        let promoted = |epoch| Record { timeline: 4, ..record(epoch) };
        assert_eq!(judge(&promoted(7), seen(7)), None);
        assert_eq!(judge(&promoted(6), seen(7)), None, "the last move had not reached it");
        assert_eq!(
            judge(&promoted(5), seen(7)),
            Some(Reason::OlderDatabase),
            "minutes are missing: recovered to a point in the past"
        );
    }

    #[test]
    fn the_file_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("epoch");
        assert_eq!(read(&file).unwrap(), None);
        for epoch in [1, RELEASE_STEP] {
            write(&file, seen(epoch).unwrap()).unwrap();
            assert_eq!(read(&file).unwrap(), seen(epoch));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        fs::write(&file, "{").unwrap();
        assert_eq!(read(&file).unwrap_err().code, "state_folder_unusable");
    }
}
