//! Jobs follow the rules of their time zones: when rules change, the next instant of a job is the wall-clock time it stood for, by the
//! new rules.

use chrono::{DateTime, NaiveDateTime, Utc};
use serde_json::json;
use sqlx::PgConnection;

use super::{
    schedule::{Schedule, ScheduleRow},
    store,
};
use crate::{Actor, Result, time_zones};

/// What was found among some jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Followed {
    /// The last job that was looked at; none when there are no more.
    pub last_id: Option<i64>,
    /// Jobs whose start or next instant has moved.
    pub moved: usize,
}

/// What is written to a job.
struct Change {
    id: i64,
    start_at: Option<DateTime<Utc>>,
    next_due_at: Option<DateTime<Utc>>,
    next_due_wall: Option<NaiveDateTime>,
}

/// Looks at up to `limit` jobs after `after`, in order of their ids, and moves the starts and next instants that the rules in use have
/// elsewhere. Each move is in the audit. A job that is due or being saved is left as it is: who decides or saves it uses the rules
/// of the moment.
///
/// # Errors
/// When the database refuses.
pub async fn follow(conn: &mut PgConnection, after: i64, limit: i64) -> Result<Followed> {
    let rows = sqlx::query!(
        r#"SELECT id, name, next_due_at AS "next_due_at!", next_due_wall, schedule_type, start_at, start_wall, timezone, cron, end_at,
                  max_occurrences, created_at, now() AS "now!"
           FROM scheduled_jobs WHERE id > $1 AND timezone <> 'UTC' AND next_due_at > now()
           ORDER BY id LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED"#,
        after,
        limit,
    )
    .fetch_all(&mut *conn)
    .await?;
    let mut followed = Followed { last_id: rows.last().map(|row| row.id), moved: 0 };
    let (mut changes, mut moves) = (Vec::new(), Vec::new());
    for row in rows {
        let schedule = Schedule::from_row(&ScheduleRow {
            schedule_type: row.schedule_type,
            start_at: row.start_at,
            start_wall: row.start_wall,
            timezone: row.timezone,
            cron: row.cron,
            end_at: row.end_at,
            max_occurrences: row.max_occurrences,
            created_at: row.created_at,
        });
        // One that cannot be read is stopped when it is due.
        let Ok(schedule) = schedule else { continue };
        let next = schedule.follow(row.next_due_at, row.next_due_wall, row.now);
        let wall = next.and_then(|next| schedule.wall_of(next)).or(row.next_due_wall);
        let moved = (schedule.start(), next) != (row.start_at, Some(row.next_due_at));
        if moved {
            let detail = json!({
                "name": row.name,
                "before": {"start": row.start_at, "next_due_at": row.next_due_at},
                "after": {"start": schedule.start(), "next_due_at": next},
                "timezone": schedule.timezone().name(),
                "time_zone_rules": time_zones::current().version(),
            });
            moves.push((row.id, detail));
        }
        if moved || wall != row.next_due_wall {
            changes.push(Change { id: row.id, start_at: schedule.start(), next_due_at: next, next_due_wall: wall });
        }
    }
    if !changes.is_empty() {
        sqlx::query!(
            "UPDATE scheduled_jobs j SET start_at = t.start_at, next_due_at = t.next_due_at, next_due_wall = t.next_due_wall
             FROM unnest($1::bigint[], $2::timestamptz[], $3::timestamptz[], $4::timestamp[])
                  AS t(id, start_at, next_due_at, next_due_wall)
             WHERE j.id = t.id",
            &changes.iter().map(|change| change.id).collect::<Vec<_>>(),
            &changes.iter().map(|change| change.start_at).collect::<Vec<_>>() as &[Option<DateTime<Utc>>],
            &changes.iter().map(|change| change.next_due_at).collect::<Vec<_>>() as &[Option<DateTime<Utc>>],
            &changes.iter().map(|change| change.next_due_wall).collect::<Vec<_>>() as &[Option<NaiveDateTime>],
        )
        .execute(&mut *conn)
        .await?;
    }
    followed.moved = moves.len();
    let system = Actor::system();
    for (id, detail) in moves {
        store::record(conn, &system, "scheduled_job.move", id, detail).await?;
    }
    Ok(followed)
}
