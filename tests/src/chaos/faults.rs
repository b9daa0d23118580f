//! What happens to the engine: one fault after the other, each undone after a while, all of it decided by the seed.

use std::{collections::BTreeMap, time::Duration};

use rand::{RngExt, rngs::StdRng};
use tokio::time::{Instant, sleep_until};

use super::{AGENT_CLOCK, APIS, CLOCKS, Scene, WORKERS};
use crate::{fleet::Departure, proxy::Line};

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy)]
enum Fault {
    KillWorker(usize),
    FreezeWorker(usize),
    KillApi(usize),
    FreezeApi(usize),
    CrashPostgres,
    RestartPostgres,
    CutLine(usize),
    StallLine(usize),
    SlowLine(usize),
    CutListeners(usize),
    AgentsVanish,
    KillAgent,
    FreezeAgent,
    RestartAgent,
    /// The clock of a process shows another time, by so many seconds.
    TurnClock(usize, i32),
}

impl Fault {
    fn pick(rng: &mut StdRng) -> Self {
        let line = rng.random_range(0..APIS + WORKERS);
        match rng.random_range(0..100) {
            0..18 => Self::KillWorker(rng.random_range(0..WORKERS)),
            18..28 => Self::FreezeWorker(rng.random_range(0..WORKERS)),
            28..39 => Self::KillApi(rng.random_range(0..APIS)),
            39..44 => Self::FreezeApi(rng.random_range(0..APIS)),
            44..48 => Self::CrashPostgres,
            48..51 => Self::RestartPostgres,
            51..59 => Self::CutLine(line),
            59..65 => Self::StallLine(line),
            65..72 => Self::SlowLine(line),
            72..77 => Self::CutListeners(line),
            77..84 => Self::AgentsVanish,
            84..88 => Self::KillAgent,
            88..90 => Self::FreezeAgent,
            90..92 => Self::RestartAgent,
            _ => {
                let seconds = [-3600, -300, 300, 3600];
                Self::TurnClock(rng.random_range(0..CLOCKS), seconds[rng.random_range(0..seconds.len())])
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::KillWorker(_) => "worker killed",
            Self::FreezeWorker(_) => "worker frozen",
            Self::KillApi(_) => "API killed",
            Self::FreezeApi(_) => "API frozen",
            Self::CrashPostgres => "Postgres crashed",
            Self::RestartPostgres => "Postgres restarted",
            Self::CutLine(_) => "line to Postgres cut",
            Self::StallLine(_) => "line to Postgres stalled",
            Self::SlowLine(_) => "line to Postgres slow",
            Self::CutListeners(_) => "LISTEN connections cut",
            Self::AgentsVanish => "agents vanished",
            Self::KillAgent => "real agent killed",
            Self::FreezeAgent => "real agent frozen",
            Self::RestartAgent => "real agent restarted",
            Self::TurnClock(..) => "clock turned",
        }
    }
}

/// What undoes a fault.
#[derive(Debug, Clone, Copy)]
enum Mending {
    StartWorker(usize),
    ThawWorker(usize),
    StartApi(usize),
    ThawApi(usize),
    ClearLine(usize),
    StartAgent,
    ThawAgent,
    SetClock(usize),
}

/// Makes faults for `lasts`, then undoes what is left. Answers how often each was made.
pub async fn make(scene: &mut Scene, mut rng: StdRng, lasts: Duration) -> BTreeMap<&'static str, usize> {
    let mut made = BTreeMap::new();
    let mut mendings: Vec<(Instant, Mending)> = Vec::new();
    let end = Instant::now() + lasts;
    let mut next = Instant::now() + Duration::from_millis(500);
    while next < end {
        mendings.sort_by_key(|(at, _)| *at);
        match mendings.first().copied() {
            Some((at, mending)) if at <= next => {
                sleep_until(at).await;
                mendings.remove(0);
                scene.say(&format!("mending: {mending:?}"));
                scene.mend(mending).await;
            }
            _ => {
                sleep_until(next).await;
                let fault = Fault::pick(&mut rng);
                let lasting = Duration::from_millis(rng.random_range(100..3_000));
                scene.say(&format!("{fault:?} for {lasting:?}"));
                if let Some(mending) = scene.suffer(fault, &mut rng).await {
                    // A frozen worker sometimes sleeps past its leases.
                    let longer = if matches!(mending, Mending::ThawWorker(_)) { 5 } else { 1 };
                    mendings.push((Instant::now() + lasting * longer, mending));
                }
                *made.entry(fault.name()).or_insert(0) += 1;
                next = Instant::now() + Duration::from_millis(rng.random_range(200..1_200));
            }
        }
    }
    mendings.sort_by_key(|(at, _)| *at);
    for (_, mending) in mendings {
        scene.say(&format!("mending: {mending:?}"));
        scene.mend(mending).await;
    }
    scene.say("all is mended");
    made
}

impl Scene {
    async fn suffer(&mut self, fault: Fault, rng: &mut StdRng) -> Option<Mending> {
        match fault {
            Fault::KillWorker(index) => {
                self.workers.get_mut(index)?.take()?.kill();
                Some(Mending::StartWorker(index))
            }
            Fault::FreezeWorker(index) => {
                self.workers.get(index)?.as_ref()?.stop();
                Some(Mending::ThawWorker(index))
            }
            Fault::KillApi(index) => {
                self.house.apis.get_mut(index)?.process.take()?.kill();
                Some(Mending::StartApi(index))
            }
            Fault::FreezeApi(index) => {
                self.house.apis.get(index)?.process.as_ref()?.stop();
                Some(Mending::ThawApi(index))
            }
            Fault::CrashPostgres => {
                let stopped = self.cluster.take()?.crash().await;
                self.cluster = Some(stopped.start().await);
                None
            }
            Fault::RestartPostgres => {
                let stopped = self.cluster.take()?.stop().await;
                self.cluster = Some(stopped.start().await);
                None
            }
            Fault::CutLine(index) => {
                self.proxies.get(index)?.cut();
                None
            }
            Fault::StallLine(index) => {
                self.proxies.get(index)?.set(Line { stalls: true, ..Line::default() });
                Some(Mending::ClearLine(index))
            }
            Fault::SlowLine(index) => {
                let latency = Duration::from_millis(rng.random_range(5..200));
                self.proxies.get(index)?.set(Line { latency, ..Line::default() });
                Some(Mending::ClearLine(index))
            }
            Fault::CutListeners(index) => {
                self.proxies.get(index)?.cut_listeners();
                None
            }
            Fault::AgentsVanish => {
                let from = rng.random_range(0..self.agents);
                let how = match rng.random_range(0..3) {
                    0 => Departure::Cut,
                    1 => Departure::Reset,
                    _ => Departure::Silent,
                };
                let away = Duration::from_millis(rng.random_range(0..3_000));
                self.fleet.vanish(from..(from + self.agents / 4).min(self.agents), how, away);
                None
            }
            Fault::KillAgent => {
                self.real.kill()?;
                Some(Mending::StartAgent)
            }
            Fault::FreezeAgent => {
                self.real.freeze()?;
                Some(Mending::ThawAgent)
            }
            Fault::RestartAgent => {
                self.real.ask_to_end()?;
                Some(Mending::StartAgent)
            }
            Fault::TurnClock(index, seconds) => {
                self.clocks.as_ref()?.turn(index, seconds);
                Some(Mending::SetClock(index))
            }
        }
    }

    async fn mend(&mut self, mending: Mending) {
        match mending {
            Mending::StartWorker(index) => self.start_worker(index),
            Mending::ThawWorker(index) => {
                if let Some(Some(worker)) = self.workers.get(index) {
                    worker.resume();
                }
            }
            Mending::StartApi(index) => self.start_api(index).await,
            Mending::ThawApi(index) => {
                if let Some(process) = self.house.apis.get(index).and_then(|api| api.process.as_ref()) {
                    process.resume();
                }
            }
            Mending::ClearLine(index) => {
                if let Some(proxy) = self.proxies.get(index) {
                    proxy.set(Line::default());
                }
            }
            Mending::StartAgent => {
                if let Some(clocks) = &self.clocks {
                    clocks.wear(AGENT_CLOCK, &mut self.house.processes);
                }
                self.real.start(&mut self.house.processes).await;
            }
            Mending::ThawAgent => self.real.thaw(),
            Mending::SetClock(index) => {
                if let Some(clocks) = &self.clocks {
                    clocks.turn(index, 0);
                }
            }
        }
    }
}
