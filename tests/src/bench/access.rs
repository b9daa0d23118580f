//! `bench access`: what signing in costs, whom it slows down, and whether the time it takes tells who exists.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use borealis_engine::access::{
    passwords::{self, Digest},
    sessions,
};
use serde_json::json;

use super::{Environment, Latencies, Report, environment::machine, load, stand::Stand};
use crate::{
    Actor, Reply,
    engine::{ADMIN, PASSWORD},
};

/// How many sign in at the same time beside the load.
const PARALLEL: usize = 20;

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Devices in the tables.
    #[arg(long, default_value_t = 10_000)]
    pub devices: usize,
    /// Requests of the device page a second.
    #[arg(long, default_value_t = 50.0)]
    pub rate: f64,
    /// Seconds of each load.
    #[arg(long, default_value_t = 15)]
    pub seconds: u64,
    /// Refused sign-ins of each kind.
    #[arg(long, default_value_t = 1000)]
    pub tries: usize,
}

async fn sign_in(nobody: &Actor, username: &str, password: &str) -> (Duration, Reply) {
    let began = Instant::now();
    let reply = nobody.post("/api/auth/login", json!({"username": username, "password": password})).await;
    (began.elapsed(), reply)
}

/// Runs the bench.
pub async fn run(options: &Options) -> Report {
    let mut report = Report::new("access", &machine());
    let mut environment = Environment::start().await;
    environment.processes.set("BOREALIS_EGRESS_ALLOW", "127.0.0.1");
    let stand = Stand::on(environment).await;
    let _ = stand.machines(options.devices).await;
    let nobody = Actor::anonymous(&stand.installation.base);

    // What the password costs by itself, and in a sign-in.
    let digest = Digest::of(PASSWORD);
    let verifier = passwords::verifier(&digest).await.expect("a verifier");
    let (mut hashes, mut logins) = (Latencies::default(), Latencies::default());
    for _ in 0..100 {
        let began = Instant::now();
        assert!(passwords::verify(&digest, Some(verifier.clone())).await.expect("an answer"), "the password is right");
        hashes.add(began.elapsed());
        let (took, reply) = sign_in(&nobody, ADMIN, PASSWORD).await;
        let _ = reply.ok();
        logins.add(took);
    }
    report.figure("reference: Argon2id alone (19 MiB, 3 passes, 1 lane), p50", hashes.percentile(50.0), "ms");
    report.figure("sign-in with the password, p50", logins.percentile(50.0), "ms");
    report.figure("sign-in to Argon2id alone", logins.percentile(50.0) / hashes.percentile(50.0), "x");

    // What finding the session adds to a request.
    let mut lookups = Latencies::default();
    for _ in 0..2000 {
        let began = Instant::now();
        let found = sessions::find(&stand.database.pool, stand.token(), sessions::Lifetimes::default()).await;
        assert!(found.expect("an answer").is_some(), "the session is there");
        lookups.add(began.elapsed());
    }
    report.at_most(1.0, "session lookup, p50", lookups.percentile(50.0), "ms");

    // The device page, alone and while twenty sign in over and over.
    let page = format!("{}api/devices?slim=1&limit=100", stand.installation.base);
    let lasts = Duration::from_secs(options.seconds);
    let alone = load::get(options.rate, lasts, Some(stand.token()), |_| page.clone()).await;
    report.figure("requests of the device page a second", options.rate, "/s");
    report.figure("device page alone, p99", alone.latencies.percentile(99.0), "ms");
    // Each with an account of its own: five at once are the most of one.
    for number in 0..PARALLEL {
        let user = json!({"username": format!("signer-{number}"), "password": PASSWORD, "role": "User"});
        let _ = stand.installation.admin.post("/api/users", user).await.ok();
    }
    let done = Arc::new(AtomicBool::new(false));
    let signing: Vec<_> = (0..PARALLEL)
        .map(|number| {
            let (nobody, done, name) = (nobody.clone(), done.clone(), format!("signer-{number}"));
            tokio::spawn(async move {
                let mut logins = Latencies::default();
                while !done.load(Ordering::Relaxed) {
                    let (took, reply) = sign_in(&nobody, &name, PASSWORD).await;
                    let _ = reply.ok();
                    logins.add(took);
                }
                logins
            })
        })
        .collect();
    let beside = load::get(options.rate, lasts, Some(stand.token()), |_| page.clone()).await;
    done.store(true, Ordering::Relaxed);
    let mut count = 0;
    for task in signing {
        count += task.await.expect("sign-ins").count();
    }
    #[allow(clippy::cast_precision_loss)]
    report.figure("sign-ins a second, 20 at a time", count as f64 / lasts.as_secs_f64(), "/s");
    report.at_most(50.0, "device page beside 20 parallel sign-ins, p99", beside.latencies.percentile(99.0), "ms");
    #[allow(clippy::cast_precision_loss)]
    report.at_most(0.0, "device page beside 20 parallel sign-ins, failed", beside.failed as f64, "");

    refusals(&stand, &nobody, options, &mut report).await;
    report
}

/// Whether a refusal tells by its time whether the name exists: with a directory that is down beside the local accounts.
async fn refusals(stand: &Stand, nobody: &Actor, options: &Options, report: &mut Report) {
    let (admin, pool) = (&stand.installation.admin, &stand.database.pool);
    let _ = admin.post("/api/users", json!({"username": "switched-off", "password": PASSWORD, "role": "User"})).await.ok();
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let provider = json!({"name": "Down", "server_urls": ["ldaps://127.0.0.1:9"], "base_dn": "dc=down"});
    let _ = admin.post("/api/directory/providers", provider).await.ok();
    sqlx::raw_sql(
        "UPDATE users SET directory_disabled = true WHERE username = 'switched-off';
         UPDATE directory_providers SET enabled = true",
    )
    .execute(pool)
    .await
    .expect("the set-up");
    let kinds = [
        ("unknown name", "nobody", PASSWORD),
        ("wrong password", ADMIN, "not the password at all"),
        ("account that is off, right password", "switched-off", PASSWORD),
    ];
    let mut times = kinds.map(|_| Latencies::default());
    for _ in 0..options.tries {
        for ((_, name, password), times) in kinds.iter().zip(&mut times) {
            sqlx::query("DELETE FROM rate_counters").execute(pool).await.expect("a deletion");
            let (took, reply) = sign_in(nobody, name, password).await;
            let _ = reply.error(401, "invalid username or password");
            times.add(took);
        }
    }
    let medians: Vec<f64> = times.iter_mut().map(|times| times.percentile(50.0)).collect();
    for ((kind, ..), median) in kinds.iter().zip(&medians) {
        report.figure(format!("refused sign-in, {kind}, directory down: median"), *median, "ms");
    }
    let (least, most) = medians.iter().fold((f64::MAX, 0.0f64), |(least, most), median| (least.min(*median), most.max(*median)));
    report.at_most(1.1, "refused sign-ins, slowest median to fastest", most / least, "x");
}
