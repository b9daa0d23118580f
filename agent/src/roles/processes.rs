//! The processes of the machine.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use borealis_protocol::calls::{
    ACTION_LIST, AGENT_ERROR, PROCESS_MANAGEMENT_REQUEST, PROCESSES_MAX, PROCESSES_REFRESH_MS, Process, ProcessRequest,
    ProcessSnapshot, Refusal, process_list_age_s,
};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde::Deserialize as _;
use serde_json::{Value, json};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System, UpdateKind, Users};

use super::Role;
use crate::clock::local_now;
use crate::socket::Inbound;

/// Over how long the use of processors is measured when there is no recent measurement to start from.
const MEASURE: Duration = Duration::from_millis(300);
/// A measurement that is older than this is none to start from: the use since then says nothing about now.
const RECENT: Duration = Duration::from_secs(15);
/// The most characters of a command line, and of all of them together.
const COMMAND_LINE_CHARS: (usize, usize) = (4_096, 3 * 1024 * 1024);
/// Requests that are handled at once; all but the first are answered from its snapshot.
const AT_ONCE: usize = 4;

/// Lists the processes of the machine.
#[derive(Default)]
pub(crate) struct Processes(Arc<Mutex<Measured>>);

#[derive(Default)]
struct Measured {
    system: Option<System>,
    users: Option<Users>,
    last: Option<(Instant, ProcessSnapshot)>,
}

impl Role for Processes {
    fn events(&self) -> &'static [&'static str] {
        &[PROCESS_MANAGEMENT_REQUEST]
    }

    fn at_once(&self) -> usize {
        AT_ONCE
    }

    fn handle<'a>(&'a self, event: &'a Inbound) -> BoxFuture<'a, Value> {
        async move {
            let Ok(request) = ProcessRequest::deserialize(&event.argument) else {
                return Refusal::new("invalid_request", "The request cannot be read.").to_answer();
            };
            if request.action != ACTION_LIST {
                return Refusal::new("unsupported_action", "This agent lists processes, and does nothing else with them.")
                    .to_answer();
            }
            let measured = Arc::clone(&self.0);
            let listed = tokio::task::spawn_blocking(move || {
                measured.lock().unwrap_or_else(PoisonError::into_inner).list(max_age(request.max_age_seconds))
            });
            match listed.await {
                Ok(Some(answer)) => answer,
                Ok(None) | Err(_) => Refusal::new(AGENT_ERROR, "The processes of this machine cannot be read.").to_answer(),
            }
        }
        .boxed()
    }
}

fn max_age(asked: f64) -> Duration {
    Duration::from_secs_f64(process_list_age_s(Some(asked).filter(|asked| *asked > 0.0)))
}

impl Measured {
    /// The answer: the last snapshot if it is not older than `max_age`, else a new one.
    fn list(&mut self, max_age: Duration) -> Option<Value> {
        let fresh = self.last.as_ref().is_some_and(|(at, _)| at.elapsed() <= max_age);
        if !fresh {
            self.measure()?;
        }
        let mut answer = json!({"ok": true});
        let (_, snapshot) = self.last.as_ref()?;
        let Value::Object(members) = serde_json::to_value(snapshot).ok()? else { return None };
        answer.as_object_mut()?.extend(members);
        Some(answer)
    }

    fn measure(&mut self) -> Option<()> {
        let recent = self.last.as_ref().is_some_and(|(at, _)| at.elapsed() <= RECENT);
        if self.system.is_none() {
            self.system = System::new().ok();
        }
        let system = self.system.as_mut()?;
        if !recent {
            refresh(system);
            sleep(MEASURE);
        }
        refresh(system);
        if self.users.as_ref().is_none_or(|users| has_unknown_user(system, users)) {
            self.users = Users::new_with_refreshed_list().ok();
        }
        self.last = Some((Instant::now(), snapshot(system, self.users.as_ref())));
        Some(())
    }
}

fn refresh(system: &mut System) {
    // A process may become another program, and another user's.
    let what = ProcessRefreshKind::nothing()
        .with_cpu()
        .with_memory()
        .with_cmd(UpdateKind::Always)
        .with_exe(UpdateKind::Always)
        .with_user(UpdateKind::Always)
        .without_tasks();
    system.refresh_memory();
    system.refresh_cpu_usage();
    system.refresh_processes_specifics(ProcessesToUpdate::All, true, what);
}

fn has_unknown_user(system: &System, users: &Users) -> bool {
    system.processes().values().filter_map(|process| process.user_id()).any(|id| users.get_user_by_id(id).is_none())
}

fn snapshot(system: &System, users: Option<&Users>) -> ProcessSnapshot {
    let now = local_now();
    let (processors, memory) = (system.cpus().len().max(1), system.total_memory());
    let mut children: HashMap<Pid, i64> = HashMap::new();
    for parent in system.processes().values().filter_map(sysinfo::Process::parent) {
        *children.entry(parent).or_default() += 1;
    }
    let mut found: Vec<_> = system.processes().iter().filter(|(_, process)| process.thread_kind().is_none()).collect();
    // Of too many, the largest; kernel threads have no memory.
    found.sort_by_key(|(pid, process)| (std::cmp::Reverse(process.memory()), **pid));
    let truncated = found.len() > PROCESSES_MAX;
    found.truncate(PROCESSES_MAX);
    let (line, lines) = COMMAND_LINE_CHARS;
    let command_line_chars = line.min(lines / found.len().max(1));
    let processes = found
        .into_iter()
        .map(|(pid, process)| {
            let created_at = i64::try_from(process.start_time()).unwrap_or(0);
            let words: Vec<_> = process.cmd().iter().map(|word| word.to_string_lossy()).collect();
            let raw = f64::from(process.cpu_usage());
            let child_count = children.get(pid).copied().unwrap_or(0);
            #[expect(clippy::cast_precision_loss, reason = "shares for people")]
            let (processors, used, all) = (processors as f64, process.memory() as f64, memory.max(1) as f64);
            Process {
                id: format!("{pid}:{created_at}"),
                pid: i64::from(pid.as_u32()),
                parent_pid: process.parent().map_or(0, |parent| i64::from(parent.as_u32())),
                name: process.name().to_string_lossy().into_owned(),
                cpu_percent: round(raw / processors),
                raw_cpu_percent: round(raw),
                memory_percent: round(used * 100.0 / all),
                memory_bytes: i64::try_from(process.memory()).unwrap_or(i64::MAX),
                command_line: words.join(" ").chars().take(command_line_chars).collect(),
                executable_path: process.exe().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
                username: process.user_id().map(|id| name_of(users, id)).unwrap_or_default(),
                status: process.status().to_string().to_lowercase(),
                created_at,
                captured_at: now,
                child_count,
                has_children: child_count > 0,
                ..Process::default()
            }
        })
        .collect();
    ProcessSnapshot { reported_at: now, refresh_interval_ms: PROCESSES_REFRESH_MS, truncated, processes }
}

/// A user's name, or the id of one that has none.
fn name_of(users: Option<&Users>, id: &sysinfo::Uid) -> String {
    users.and_then(|users| users.get_user_by_id(id)).map_or_else(|| id.to_string(), |user| user.name().to_owned())
}

/// Two decimals.
fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_of_a_snapshot_is_bounded() {
        for (asked, seconds) in
            [(0.0, 5.0), (-1.0, 5.0), (f64::NAN, 5.0), (0.1, 0.25), (3.0, 3.0), (1e300, 15.0), (f64::INFINITY, 15.0)]
        {
            assert_eq!(max_age(asked), Duration::from_secs_f64(seconds), "{asked}");
        }
    }

    #[test]
    fn this_process_is_listed_with_what_it_uses() {
        let own = std::process::id();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let busy = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        };
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let mut measured = Measured::default();
        // A process that has used nothing before the first look has no use to compare with: this one is young.
        let mut look = || {
            measured.last = None;
            let answer = measured.list(Duration::from_secs(5)).unwrap();
            assert_eq!(answer["ok"], true);
            serde_json::from_value::<ProcessSnapshot>(answer).unwrap()
        };
        let is_busy = |snapshot: &ProcessSnapshot| {
            snapshot.processes.iter().any(|process| process.pid == i64::from(own) && process.raw_cpu_percent > 1.0)
        };
        let mut snapshot = look();
        for _ in 0..20 {
            if is_busy(&snapshot) {
                break;
            }
            snapshot = look();
        }
        let find = |pid: u32| snapshot.processes.iter().find(|process| process.pid == i64::from(pid)).unwrap();
        let this = find(own);
        assert!(this.raw_cpu_percent > 1.0, "it is busy: {}", this.raw_cpu_percent);
        assert!(this.cpu_percent <= this.raw_cpu_percent && this.memory_bytes > 0 && this.memory_percent > 0.0);
        assert!(this.has_children && this.child_count >= 1);
        assert!((local_now() - this.created_at).abs() < 3_600 && this.id == format!("{own}:{}", this.created_at));
        assert!(this.command_line.contains(&this.name) && this.executable_path.starts_with('/'), "{this:?}");
        let sleeping = find(child.id());
        assert_eq!(
            (sleeping.name.as_str(), sleeping.command_line.as_str(), sleeping.parent_pid),
            ("sleep", "sleep 60", i64::from(own))
        );
        assert_eq!(sleeping.username, this.username);
        assert!(!this.username.is_empty());
        child.kill().unwrap();
        child.wait().unwrap();

        // A snapshot is used again while it is young enough.
        let again: ProcessSnapshot = serde_json::from_value(measured.list(Duration::from_secs(5)).unwrap()).unwrap();
        assert_eq!(again, snapshot);
        sleep(Duration::from_millis(300));
        let newer: ProcessSnapshot = serde_json::from_value(measured.list(Duration::from_millis(250)).unwrap()).unwrap();
        assert!(newer.processes.iter().all(|process| process.pid != i64::from(child.id())), "it has ended");
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        busy.join().unwrap();
    }
}
