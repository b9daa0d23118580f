//! What a step tells while it runs: lines of a program, events of a playbook. Each write is fenced by the lease, so that nothing comes
//! from a step whose run somebody else has taken over.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::{Pool, Result, definition::StepError};

/// Where one attempt of a step tells what happens. Its clones count on together.
#[derive(Debug, Clone)]
pub struct Output {
    pool: Pool,
    run_id: Uuid,
    token: Uuid,
    step_seq: i32,
    attempt: i32,
    /// The number of what is told next, once it is known. Held while something is written: what is told is in order.
    next: Arc<Mutex<Option<i64>>>,
}

/// One thing that was told.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// The number of the step in the run.
    pub step_seq: i32,
    /// The try of the step.
    pub attempt: i32,
    /// Its number in that attempt, from 1.
    pub n: i64,
    /// When it was written.
    pub at: DateTime<Utc>,
    /// What it is, in a word of the program's own.
    pub kind: String,
    /// What it says.
    pub data: Value,
}

impl Output {
    pub(crate) fn new(pool: Pool, run_id: Uuid, token: Uuid, step_seq: i32, attempt: i32) -> Self {
        Self { pool, run_id, token, step_seq, attempt, next: Arc::default() }
    }

    /// Writes entries, each a kind and what it says, in one statement: all or none. They can be read from then on.
    ///
    /// # Errors
    /// [`StepError::Stopped`] when the lease is lost; transient, when the database is away. Then the same entries may be written again
    /// before any others: if the first try was done after all, they are not told twice.
    pub async fn write(&self, entries: &[(&str, Value)]) -> Result<(), StepError> {
        if entries.is_empty() {
            return Ok(());
        }
        let count = i64::try_from(entries.len()).unwrap_or(i64::MAX);
        let mut next = self.next.lock().await;
        let first = match *next {
            Some(first) => first,
            // A step that was told to stop runs again as the same attempt.
            None => {
                sqlx::query_scalar!(
                    r#"SELECT coalesce(max(n), 0) + 1 AS "next!" FROM workflow_output WHERE run_id = $1 AND step_seq = $2 AND attempt = $3"#,
                    self.run_id,
                    self.step_seq,
                    self.attempt,
                )
                .fetch_one(&self.pool)
                .await?
            }
        };
        *next = Some(first);
        let (kinds, data): (Vec<&str>, Vec<&Value>) = entries.iter().map(|(kind, data)| (*kind, data)).unzip();
        // The row is locked until the entries are written, so that no other worker takes the run over meanwhile.
        let written = sqlx::query!(
            r#"WITH held AS (
                   SELECT r.id FROM workflow_runs r WHERE r.id = $1 AND r.lease_token = $2 FOR SHARE
               ), told AS (
                   INSERT INTO workflow_output (run_id, step_seq, attempt, n, kind, data)
                   SELECT held.id, $3, $4, $5 + t.at - 1, t.kind, t.data
                   FROM held, unnest($6::text[], $7::jsonb[]) WITH ORDINALITY AS t(kind, data, at)
                   ON CONFLICT (run_id, step_seq, attempt, n) DO NOTHING
               )
               SELECT count(*) AS "held!" FROM held"#,
            self.run_id,
            self.token,
            self.step_seq,
            self.attempt,
            first,
            &kinds as &[&str],
            &data as &[&Value],
        )
        .fetch_one(&self.pool)
        .await?;
        if written.held == 0 {
            return Err(StepError::Stopped);
        }
        *next = Some(first + count);
        Ok(())
    }
}

/// Where a reader is: step, attempt and number of what it has read last.
pub type Mark = (i32, i32, i64);

/// What the steps of a run have told after `mark`, in order, at most `limit` entries.
///
/// # Errors
/// When the database refuses.
pub async fn told(pool: &Pool, run_id: Uuid, mark: Mark, limit: i64) -> Result<Vec<Told>> {
    let (step_seq, attempt, n) = mark;
    sqlx::query_as!(
        Told,
        "SELECT step_seq, attempt, n, at, kind, data FROM workflow_output
         WHERE run_id = $1 AND (step_seq, attempt, n) > ($2, $3, $4) ORDER BY step_seq, attempt, n LIMIT $5",
        run_id,
        step_seq,
        attempt,
        n,
        limit,
    )
    .fetch_all(pool)
    .await
}
