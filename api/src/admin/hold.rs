//! Holding and releasing the engine.

use std::io::{BufRead, IsTerminal, Read};

use borealis_engine::{Error, Result, hold};
use borealis_workflows::scheduler;

use super::{Console, LINE_MAX_BYTES, instant, print, say, table};

/// The most due jobs shown.
const SHOWN: i64 = 200;

impl Console {
    pub(super) async fn hold(&self) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        let begins = hold::ask(&mut tx, &self.actor).await?;
        tx.commit().await?;
        say(if begins {
            "The engine is held: nothing is scheduled and nothing is dispatched. Scripts that run on devices go on."
        } else {
            "The engine is held already."
        });
        Ok(())
    }

    pub(super) async fn release(&self, skip_missed: bool, yes: bool) -> Result<()> {
        let held = hold::record(&mut *self.pool.acquire().await?).await?.held;
        let Some(held) = held else { return Err(Error::conflict("not_held", "The engine is not held.")) };
        let by = if held.by.is_empty() { String::new() } else { format!(" ({})", held.by) };
        print(&format!("Held since {}: {}{by}.\n", instant(held.since), held.reason))?;
        self.show_what_would_happen(skip_missed, held.reason.is_restored()).await?;
        if !yes && !confirmed().await? {
            return Err(Error::invalid("confirmation_required", "Nothing was changed. To release the engine, add --yes."));
        }
        let mut tx = self.pool.begin().await?;
        let skipped = if skip_missed { scheduler::skip_missed(&mut tx).await? } else { 0 };
        hold::release(&mut tx, &self.actor, &self.state_dir, skip_missed).await?;
        tx.commit().await?;
        say(&match skipped {
            0 => "The engine is released.".to_owned(),
            jobs => format!("The engine is released. Jobs whose missed instants were skipped: {jobs}."),
        });
        Ok(())
    }

    async fn show_what_would_happen(&self, skip_missed: bool, restored: bool) -> Result<()> {
        let due = scheduler::foresee(&self.pool, SHOWN).await?;
        let waiting = hold::waiting(&mut *self.pool.acquire().await?).await?;
        let more = if i64::try_from(due.len()).is_ok_and(|shown| shown >= SHOWN) { " or more" } else { "" };
        print(&format!("Jobs that are due: {}{more}\n", due.len()))?;
        if !due.is_empty() {
            let mut rows = vec![["JOB", "NAME", "DUE", "RUNS", "SKIPPED", "NEXT"].map(str::to_owned)];
            for job in due {
                let instants = i64::try_from(job.runs).unwrap_or(i64::MAX).saturating_add(job.skipped);
                let (runs, skipped) = if skip_missed { (0, instants) } else { (job.runs, job.skipped) };
                rows.push([
                    job.job_id.to_string(),
                    job.name,
                    instant(job.due_at),
                    runs.to_string(),
                    skipped.to_string(),
                    job.next_due_at.map_or_else(|| "never".to_owned(), instant),
                ]);
            }
            table(&rows)?;
        }
        let fate = if skip_missed && restored { "are not sent any more" } else { "are sent" };
        print(&format!(
            "Scripts that wait for their devices, and {fate}: {}\nWorkflow runs that go on: {}\n",
            waiting.scripts, waiting.workflow_runs
        ))
    }
}

/// Whether somebody at a terminal says yes.
async fn confirmed() -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Ok(false);
    }
    eprint!("Release the engine? Type yes: ");
    let line = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().lock().take(LINE_MAX_BYTES as u64).read_line(&mut line).map(|_| line)
    });
    Ok(line.await.map_err(Error::bug)?.map_err(Error::bug)?.trim() == "yes")
}
