//! The scheduler's cursor: which jobs are due, and moving them on.

use chrono::{DateTime, NaiveDateTime, Utc};
use sqlx::PgConnection;

use super::schedule::{MisfirePolicy, OverlapPolicy, Schedule, ScheduleRow};
use crate::Result;

/// A job whose next instant has come. Its row is locked by the transaction that asked.
#[derive(Debug)]
pub struct DueJob {
    /// The job.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// The instant that has come.
    pub next_due_at: DateTime<Utc>,
    /// How many instants the schedule has used up.
    pub occurrences_used: i64,
    /// The schedule, or why the stored one cannot be read.
    pub schedule: Result<Schedule>,
    /// What happens to missed instants.
    pub misfire_policy: MisfirePolicy,
    /// What happens while an earlier occurrence has not ended.
    pub overlap_policy: OverlapPolicy,
}

/// Locks up to `limit` due jobs, the longest due first, and says when that was by the database's clock. Jobs another
/// process is deciding are left to it. None for a process that has seen the epoch `at_least` when the engine is held or the database
/// behind; without an epoch that is not asked.
///
/// # Errors
/// When the database refuses.
pub async fn due(conn: &mut PgConnection, limit: i64, at_least: Option<i64>) -> Result<(DateTime<Utc>, Vec<DueJob>)> {
    let rows = sqlx::query!(
        r#"SELECT id, name, next_due_at AS "next_due_at!", occurrences_used, schedule_type, start_at, start_wall, timezone, cron, end_at,
                  max_occurrences, created_at, misfire_policy, overlap_policy, now() AS "now!"
           FROM scheduled_jobs WHERE enabled AND next_due_at <= now() AND ($2::bigint IS NULL OR (SELECT engine_may_act($2)))
           ORDER BY next_due_at LIMIT $1 FOR NO KEY UPDATE SKIP LOCKED"#,
        limit,
        at_least,
    )
    .fetch_all(conn)
    .await?;
    let now = rows.first().map_or_else(Utc::now, |row| row.now);
    let jobs = rows
        .into_iter()
        .map(|row| {
            let start_wall: Option<NaiveDateTime> = row.start_wall;
            DueJob {
                id: row.id,
                name: row.name,
                next_due_at: row.next_due_at,
                occurrences_used: row.occurrences_used,
                schedule: Schedule::from_row(&ScheduleRow {
                    schedule_type: row.schedule_type,
                    start_at: row.start_at,
                    start_wall,
                    timezone: row.timezone,
                    cron: row.cron,
                    end_at: row.end_at,
                    max_occurrences: row.max_occurrences,
                    created_at: row.created_at,
                }),
                misfire_policy: row.misfire_policy.parse().unwrap_or_default(),
                overlap_policy: row.overlap_policy.parse().unwrap_or_default(),
            }
        })
        .collect();
    Ok((now, jobs))
}

/// Where a job's cursor moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// The job.
    pub job_id: i64,
    /// The next instant; none: nothing more will come.
    pub next_due_at: Option<DateTime<Utc>>,
    /// The wall-clock time it stands for, if one decides it.
    pub next_due_wall: Option<NaiveDateTime>,
    /// How many instants were used up.
    pub used: i64,
    /// The last instant that was to run; none: as before.
    pub last: Option<DateTime<Utc>>,
}

/// Moves the cursors of locked jobs.
///
/// # Errors
/// When the database refuses.
pub async fn advance(conn: &mut PgConnection, moves: &[Move]) -> Result<()> {
    sqlx::query!(
        "UPDATE scheduled_jobs j
         SET next_due_at = t.next_due_at, next_due_wall = t.next_due_wall, occurrences_used = j.occurrences_used + t.used,
             last_occurrence_at = coalesce(t.last, j.last_occurrence_at)
         FROM unnest($1::bigint[], $2::timestamptz[], $3::bigint[], $4::timestamptz[], $5::timestamp[])
              AS t(id, next_due_at, used, last, next_due_wall)
         WHERE j.id = t.id",
        &moves.iter().map(|to| to.job_id).collect::<Vec<_>>(),
        &moves.iter().map(|to| to.next_due_at).collect::<Vec<_>>() as &[Option<DateTime<Utc>>],
        &moves.iter().map(|to| to.used).collect::<Vec<_>>(),
        &moves.iter().map(|to| to.last).collect::<Vec<_>>() as &[Option<DateTime<Utc>>],
        &moves.iter().map(|to| to.next_due_wall).collect::<Vec<_>>() as &[Option<NaiveDateTime>],
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The nearest instant any enabled job is due, as seconds from now by the database's clock.
///
/// # Errors
/// When the database refuses.
pub async fn nearest(conn: &mut PgConnection) -> Result<Option<f64>> {
    Ok(sqlx::query_scalar!(
        r#"SELECT extract(epoch FROM min(next_due_at) - clock_timestamp())::float8 AS "seconds"
           FROM scheduled_jobs WHERE enabled AND next_due_at IS NOT NULL"#
    )
    .fetch_one(conn)
    .await?)
}
