//! One real agent, the program itself, among the simulated ones. Its scripts leave a line in a file when they begin and one
//! when they end, so that what happened can be told from what was reported.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use borealis_engine::db::Pool;
use serde_json::json;

use crate::{Actor, Child, Processes, engine::id_text, eventually, fleet::identity::enrollment_code};

/// Its name.
pub const HOSTNAME: &str = "real-0";
/// How long it may take to be admitted and connected when nothing disturbs it.
const SOON: Duration = Duration::from_secs(60);
/// How long it may take to end when it is asked to.
const END_LIMIT: Duration = Duration::from_secs(30);

/// The agent.
#[derive(Debug)]
pub struct RealAgent {
    child: Option<Child>,
    /// It was asked to end and may still be running.
    ending: bool,
    effects: PathBuf,
    _folder: tempfile::TempDir,
    /// How often it was killed.
    pub kills: usize,
    /// How often it was asked to end.
    pub stops: usize,
}

impl RealAgent {
    /// Starts it, has it admitted and waits for its socket.
    pub async fn admitted(processes: &mut Processes, admin: &Actor, site: i64) -> Self {
        Self::named(processes, admin, site, HOSTNAME).await
    }

    /// The same for one of another name; nothing else may wait to be admitted.
    pub async fn named(processes: &mut Processes, admin: &Actor, site: i64, hostname: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("borealis-agent-").tempdir().expect("a folder");
        processes
            .set("BOREALIS_AGENT_SERVER_URL", admin.base.as_str())
            .set("BOREALIS_AGENT_STATE_DIR", folder.path().join("state").display().to_string())
            .set("BOREALIS_AGENT_HOSTNAME", hostname)
            .set("BOREALIS_AGENT_ENROLLMENT_CODE", enrollment_code(admin, site).await);
        let effects = folder.path().join("effects");
        std::fs::write(&effects, "").expect("a file for the effects");
        let mut agent = Self { child: None, ending: false, effects, _folder: folder, kills: 0, stops: 0 };
        agent.start(processes).await;
        let approval = eventually("the real agent asks to be enrolled", SOON, async || {
            let found = admin.get("/api/admin/device-approvals?status=pending").await.ok();
            found["approvals"].get(0).map(|approval| id_text(&approval["id"]))
        })
        .await;
        let _ = admin.post(&format!("/api/admin/device-approvals/{approval}/approve"), json!({})).await.ok();
        eventually("the real agent is online", SOON, async || {
            admin.get("/api/agents").await.ok().to_string().contains(hostname).then_some(())
        })
        .await;
        agent
    }

    /// Starts it where it is not running, after it has ended where it was asked to.
    pub async fn start(&mut self, processes: &mut Processes) {
        if let Some(child) = self.child.as_mut().filter(|_| self.ending) {
            // It may have been asked while it was frozen.
            child.resume();
            child.wait(END_LIMIT).await;
            self.child = None;
        }
        self.ending = false;
        if self.child.is_none() {
            self.child = Some(processes.start("borealis-agent", &["run"]));
        }
    }

    /// Kills it; none when it is not running.
    pub fn kill(&mut self) -> Option<()> {
        // One that is about to end by itself is not ours to signal any more.
        self.child.take_if(|_| !self.ending)?.kill();
        self.kills += 1;
        Some(())
    }

    /// Asks it to end.
    pub fn ask_to_end(&mut self) -> Option<()> {
        self.child.as_ref().filter(|_| !self.ending)?.ask_to_end();
        self.ending = true;
        self.stops += 1;
        Some(())
    }

    /// Freezes it.
    pub fn freeze(&self) -> Option<()> {
        self.child.as_ref().filter(|_| !self.ending)?.stop();
        Some(())
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        if let Some(child) = &self.child {
            child.resume();
        }
    }

    /// The script every job runs; simulated agents only pretend to. Its own file is named after the dispatch.
    pub fn script(&self) -> String {
        let effects = self.effects.display();
        format!(
            "id=$(basename \"$0\")\nid=${{id%%.*}}\necho \"begin $id\" >>'{effects}'\nsleep 0.$((RANDOM % 10))\n\
             echo \"end $id\" >>'{effects}'\necho \"chaos $id\"\n"
        )
    }

    /// Whether everything dispatched to it was executed at most once, is accounted for, and was reported as it was. Answers
    /// what is broken, and one line of what there was.
    pub async fn reckon(&self, pool: &Pool) -> (Vec<String>, String) {
        let rows: Vec<(i64, String, Option<String>, String)> = sqlx::query_as(
            "SELECT a.id, a.status, coalesce(a.error, ''), coalesce(a.stdout, '') FROM activity_history a
             JOIN devices d ON d.guid = a.device_guid WHERE d.hostname = $1 ORDER BY a.id",
        )
        .bind(HOSTNAME)
        .fetch_all(pool)
        .await
        .expect("the activities of the real agent");
        let (begun, ended) = effects(&self.effects);
        let mut broken = Vec::new();
        let mut by_end: BTreeMap<String, usize> = BTreeMap::new();
        for (id, status, error, stdout) in &rows {
            let error = error.as_deref().unwrap_or_default();
            let times = (begun.get(id).copied().unwrap_or(0), ended.get(id).copied().unwrap_or(0));
            let end = if error.is_empty() { status.clone() } else { format!("{status} ({error})") };
            let fits = match (status.as_str(), error) {
                ("Success", "") => times == (1, 1) && stdout.contains(&format!("chaos {id}\n")),
                // It was killed or told to end in the middle, and the script with it or not.
                ("Timed Out", "outcome_unknown") | ("Failed", "agent_stopped") => times.0 <= 1 && times.1 <= times.0,
                _ => false,
            };
            if !fits {
                broken.push(format!(
                    "real agent: activity {id} ended as {end}, its script began {} and ended {} times",
                    times.0, times.1
                ));
            }
            *by_end.entry(end).or_default() += 1;
        }
        for (id, times) in &begun {
            if *times > 1 {
                broken.push(format!("real agent: the script of {id} was begun {times} times"));
            }
            if !rows.iter().any(|row| row.0 == *id) {
                broken.push(format!("real agent: the script of {id} was begun, and the engine knows nothing of it"));
            }
        }
        let unknown = rows.iter().filter(|row| row.2.as_deref() == Some("outcome_unknown")).count();
        let stopped = rows.iter().filter(|row| row.2.as_deref() == Some("agent_stopped")).count();
        // It runs one script at a time.
        if unknown > self.kills || stopped > self.stops {
            broken.push(format!(
                "real agent: {unknown} outcomes are unknown after {} kills, {stopped} stopped after {} stops",
                self.kills, self.stops
            ));
        }
        let ends: Vec<String> = by_end.iter().map(|(end, times)| format!("{times} {end}")).collect();
        let summary = format!(
            "real agent: {} dispatches ({}), {} scripts begun; killed {} and stopped {} times",
            rows.len(),
            ends.join(", "),
            begun.values().sum::<usize>(),
            self.kills,
            self.stops
        );
        (broken, summary)
    }
}

/// How often each script was begun, and ended.
fn effects(file: &Path) -> (BTreeMap<i64, usize>, BTreeMap<i64, usize>) {
    let (mut begun, mut ended) = (BTreeMap::new(), BTreeMap::new());
    for line in std::fs::read_to_string(file).expect("the effects").lines() {
        let (what, id) = line.split_once(' ').unwrap_or_else(|| panic!("not a line of a script: {line:?}"));
        let counted = if what == "begin" { &mut begun } else { &mut ended };
        *counted.entry(id.parse().expect("the id of an activity")).or_insert(0) += 1;
    }
    (begun, ended)
}
