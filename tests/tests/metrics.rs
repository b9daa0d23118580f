//! What the engine tells of itself, by real processes: a job moves the meters of API and worker, a lost lease is counted, what
//! is in the tables is told while it can be looked up, spans of one run are one trace; and nobody reads it who was not meant to.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body::Bytes, extract::State, http::HeaderMap, routing::post};
use borealis_tests::{
    Actor, Child, Processes, TestDatabase, eventually,
    house::{House, SOON},
    probe,
    processes::free_port,
    proxy::Proxy,
};
use borealis_workflows::{NewRun, start};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value as Any},
    trace::v1::{Span, span::SpanKind},
};
use prost::Message;
use serde_json::{Value, json};

/// What `/metrics` said.
#[derive(Debug, Default)]
struct Scrape {
    text: String,
    families: BTreeMap<String, Family>,
}

#[derive(Debug, Default)]
struct Family {
    kind: String,
    samples: BTreeMap<(String, BTreeMap<String, String>), f64>,
}

impl Scrape {
    /// Reads the text format, version 0.0.4, and takes nothing that is not of it.
    fn read(text: &str) -> Self {
        let mut scrape = Self { text: text.to_owned(), ..Self::default() };
        let (mut helped, mut present) = (BTreeSet::new(), String::new());
        assert!(text.ends_with('\n'), "the last line has no end");
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap_or_else(|| panic!("no help: {line}"));
                assert!(!help.is_empty() && helped.insert(name.to_owned()), "{line}");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap_or_else(|| panic!("no type: {line}"));
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert!(helped.contains(name), "no help before: {line}");
                present = name.to_owned();
                let family = Family { kind: kind.to_owned(), ..Family::default() };
                assert!(scrape.families.insert(present.clone(), family).is_none(), "twice: {line}");
            } else {
                let (name, labels, value) = sample(line);
                let family = scrape.families.get_mut(&present).unwrap_or_else(|| panic!("no type before: {line}"));
                let of_family = match family.kind.as_str() {
                    "histogram" => ["_bucket", "_sum", "_count"].iter().any(|end| name == format!("{present}{end}")),
                    _ => name == present,
                };
                assert!(of_family, "a sample of another family than {present}: {line}");
                assert!(family.kind != "counter" || name.ends_with("_total") && value >= 0.0, "{line}");
                assert!(family.samples.insert((name, labels), value).is_none(), "twice: {line}");
            }
        }
        scrape.families.values().filter(|family| family.kind == "histogram").for_each(whole);
        scrape
    }

    /// The value of one time series; nought when it is not there.
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.find(name, labels).unwrap_or(0.0)
    }

    fn find(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| self.families.get(name.strip_suffix(end)?));
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        family.or_else(|| self.families.get(name))?.samples.get(&(name.to_owned(), labels)).copied()
    }

    /// The sum of all time series of a name that have these labels.
    fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let samples = self.families.get(name).into_iter().flat_map(|family| &family.samples);
        let has =
            |all: &BTreeMap<String, String>| labels.iter().all(|(name, value)| all.get(*name).is_some_and(|is| is == value));
        samples.filter(|((_, all), _)| has(all)).map(|(_, value)| value).sum()
    }
}

/// `name{label="value",...} number`
fn sample(line: &str) -> (String, BTreeMap<String, String>, f64) {
    let is_name = |text: &str| {
        text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
            && text.chars().all(|one| one.is_ascii_alphanumeric() || one == '_')
    };
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line}"));
    let value = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
    let (name, mut rest) = series.split_once('{').map_or((series, ""), |(name, rest)| (name, rest));
    assert!(is_name(name), "{line}");
    let mut labels = BTreeMap::new();
    if series.contains('{') {
        loop {
            let (label, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("no label: {line}"));
            let (value, after) = after.split_once('"').unwrap_or_else(|| panic!("no end of a label: {line}"));
            assert!(is_name(label) && !value.contains('\\'), "{line}");
            assert!(labels.insert(label.to_owned(), value.to_owned()).is_none(), "{line}");
            if after == "}" {
                break;
            }
            rest = after.strip_prefix(',').unwrap_or_else(|| panic!("no comma: {line}"));
        }
    }
    (name.to_owned(), labels, value)
}

/// A histogram's buckets grow, the last one is infinite and as large as the count.
fn whole(family: &Family) {
    let mut series: BTreeMap<BTreeMap<String, String>, Vec<(f64, f64)>> = BTreeMap::new();
    for ((name, labels), value) in family.samples.iter().filter(|((name, _), _)| name.ends_with("_bucket")) {
        let mut labels = labels.clone();
        let bound = labels.remove("le").unwrap_or_else(|| panic!("a bucket of {name} without bound"));
        let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().expect("a bound") };
        series.entry(labels).or_default().push((bound, *value));
    }
    for (labels, mut buckets) in series {
        buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
        assert!(buckets.is_sorted_by(|one, other| one.1 <= other.1), "{labels:?}: {buckets:?}");
        let last = buckets.last().copied().expect("a bucket");
        let find = |end: &str| {
            family.samples.iter().find(|((name, all), _)| name.ends_with(end) && *all == labels).map(|(_, value)| *value)
        };
        assert_eq!(Some(last), find("_count").map(|count| (f64::INFINITY, count)), "{labels:?}");
        assert!(find("_sum").is_some_and(|sum| sum >= 0.0), "{labels:?}");
    }
}

fn client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().expect("a client")
}

async fn scrape(addr: SocketAddr) -> Scrape {
    let answer = client().get(format!("http://{addr}/metrics")).send().await.expect("metrics");
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    Scrape::read(&answer.text().await.expect("a text"))
}

/// Where a process that was told to take any port serves its metrics: it says so.
async fn metrics_of(process: &Child) -> SocketAddr {
    eventually("the process says where its metrics are", SOON, async || {
        let line = process.output().lines().find(|line| line.contains("metrics") && line.contains("addr"))?.to_owned();
        let at = line.find("127.0.0.1:")?;
        let end =
            line[at..].find(|one: char| !one.is_ascii_digit() && one != '.' && one != ':').map_or(line.len(), |end| at + end);
        line[at..end].parse().ok()
    })
    .await
}

/// The JSON lines a process has logged.
fn logged(process: &Child) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line}"));
    process.output().lines().map(parse).collect()
}

/// The names in the tables of metrics in `docs/operations.md`.
fn documented() -> BTreeSet<String> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md")).expect("the document");
    let section = text.split("\n## ").find(|section| section.starts_with("Metrics\n")).expect("a section on metrics").to_owned();
    let name = |line: &str| Some(line.strip_prefix("| `")?.split(['`', '{']).next()?.to_owned());
    section.lines().filter_map(name).filter(|name| name.starts_with("borealis_") || name.starts_with("process_")).collect()
}

/// These settings for every process of a house.
fn set(settings: &[(&str, &str)]) -> impl Fn(usize, &mut Processes) {
    move |_, processes| {
        for (name, value) in settings {
            processes.set(name, *value);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_moves_the_meters_of_api_and_worker_and_the_log_says_whose_lines_are_whose() {
    let database = TestDatabase::start().await;
    let url = database.url.clone();
    // Nobody is at the endpoint of the traces, which must trouble nobody.
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let settings = [
        ("BOREALIS_METRICS_LISTEN", "127.0.0.1:0"),
        ("BOREALIS_OTLP_ENDPOINT", nowhere.as_str()),
        ("BOREALIS_LOG_FORMAT", "json"),
        ("BOREALIS_LOG", "info,borealis_api=debug,sqlx=debug"),
    ];
    let mut house = House::open_with(database, std::slice::from_ref(&url), std::slice::from_ref(&url), set(&settings)).await;
    let api = metrics_of(house.apis[0].process.as_ref().expect("an API process")).await;
    let worker = metrics_of(&house.workers[0]).await;

    let before = scrape(worker).await;
    assert_eq!(before.find("borealis_lease_losses_total", &[("noticed", "commit")]), Some(0.0), "shown from the start");
    assert_eq!(before.find("borealis_build_info", &[("program", "borealis-worker"), ("version", "0.1.0")]), Some(1.0));
    assert!(before.value("process_resident_memory_bytes", &[]) > 1e6 && before.value("process_start_time_seconds", &[]) > 1e9);

    let script = house.script().await;
    let robot = house.robot(&[0]).await;
    let admin = house.admin.at(&house.admin.base);
    let job = house.run_now(&admin, &script, &[&robot]).await;
    house.all_are(job, "Success", 1).await;
    house.workflows_end().await;
    let run: String =
        sqlx::query_scalar("SELECT id::text FROM workflow_runs").fetch_one(&house.database.pool).await.expect("the run");
    let made_up = admin.get("/api/made-up-by-somebody").await.expect(404);
    let _ = admin.get(&format!("/api/devices/{}", robot.device.guid)).await;

    // The worker.
    let after = eventually("the worker has counted the run", SOON, async || {
        let after = scrape(worker).await;
        (after.value("borealis_runs_ended_total", &[("state", "succeeded"), ("workflow", "scheduled_run")]) == 1.0)
            .then_some(after)
    })
    .await;
    for step in ["resolve", "dispatch", "results", "finish"] {
        let labels = [("outcome", "committed"), ("step", step), ("workflow", "scheduled_run")];
        assert_eq!(after.value("borealis_steps_total", &labels), 1.0, "{step}\n{}", after.text);
        let timed = after.value("borealis_step_seconds_count", &[("step", step), ("workflow", "scheduled_run")]);
        let attempts = after.sum("borealis_steps_total", &[("step", step)]);
        assert!(timed >= 1.0 && timed == attempts, "{step}: {timed} of {attempts}");
    }
    assert!(after.value("borealis_step_handover_seconds_count", &[]) >= 2.0, "{}", after.text);
    assert!(after.value("borealis_claimed_runs_total", &[("queue", "scheduled_run.v1")]) >= 1.0);
    assert!(after.value("borealis_claim_seconds_count", &[("queue", "scheduled_run.v1")]) >= 1.0);
    assert!(
        after.value("borealis_commit_batch_size_count", &[]) >= 1.0 && after.value("borealis_commit_seconds_count", &[]) >= 1.0
    );
    assert_eq!(after.value("borealis_runs_started_total", &[("workflow", "scheduled_run")]), 1.0);
    assert_eq!(after.value("borealis_scheduler_jobs_decided_total", &[]), 1.0);
    assert_eq!(after.value("borealis_scheduler_instants_total", &[("decision", "run")]), 1.0);
    assert_eq!(after.value("borealis_scheduler_lateness_seconds_count", &[]), 1.0);
    assert_eq!(after.value("borealis_scheduler_leads", &[]), 1.0);
    assert!(after.value("borealis_dispatches_asked_total", &[]) >= 1.0);
    assert!(after.value("borealis_api_request_seconds_count", &[("result", "ok"), ("route", "host-service-event")]) >= 1.0);
    assert_eq!(after.value("borealis_leases_held", &[]), 0.0);
    for pool in ["steps", "vital", "claims"] {
        let (open, max) = (
            after.value("borealis_pool_connections", &[("pool", pool), ("state", "open")]),
            after.value("borealis_pool_connections", &[("pool", pool), ("state", "max")]),
        );
        assert!(0.0 < open && open <= max, "{pool}: {open} of {max}");
    }
    assert!(after.value("borealis_pool_acquire_seconds_count", &[]) > before.value("borealis_pool_acquire_seconds_count", &[]));
    assert_eq!(after.value("borealis_postgres_up", &[]), 1.0);
    assert_eq!(after.find("borealis_queue_ready_runs", &[("queue", "scheduled_run.v1")]), Some(0.0));

    // The API.
    let seen = scrape(api).await;
    assert_eq!(seen.value("borealis_dispatches_total", &[("result", "sent")]), 1.0, "{}", seen.text);
    assert!(seen.value("borealis_results_total", &[("outcome", "applied")]) >= 1.0);
    assert!(seen.value("borealis_results_batch_size_count", &[]) >= 1.0);
    assert_eq!(seen.value("borealis_sockets", &[("kind", "agent")]), 1.0);
    assert_eq!(seen.value("borealis_workers", &[("state", "alive")]), 1.0);
    let routes = |listener: &str, method: &str, route: &str| {
        seen.sum("borealis_http_requests_total", &[("listener", listener), ("method", method), ("route", route)])
    };
    assert_eq!(routes("public", "POST", "/api/scheduled_jobs"), 1.0);
    assert!(routes("internal", "POST", "/api/internal/job-scheduler/host-service-event") >= 1.0);
    assert_eq!(routes("public", "GET", "/api/devices/{guid}"), 1.0, "{}", seen.text);
    assert_eq!(seen.sum("borealis_http_requests_total", &[("route", "none"), ("status", "404")]), 1.0);
    let timed = seen.value(
        "borealis_http_request_seconds_count",
        &[("listener", "public"), ("method", "POST"), ("route", "/api/scheduled_jobs")],
    );
    assert_eq!(timed, 1.0);

    // Nothing that grows with devices, runs or the imagination of clients is a label.
    for scrape in [&after, &seen] {
        for secret in [robot.device.guid.as_str(), &robot.device.hostname, &run, "made-up-by-somebody"] {
            assert!(!scrape.text.to_lowercase().contains(&secret.to_lowercase()), "{secret} is in the metrics");
        }
        assert!(scrape.text.lines().count() < 3_000, "{} time series", scrape.text.lines().count());
    }
    // What is shown is explained, and what is explained is shown.
    let shown: BTreeSet<String> = after.families.keys().chain(seen.families.keys()).cloned().collect();
    assert_eq!(shown, documented(), "docs/operations.md does not tell of what there is");

    // One's requests and runs are found in the log.
    let asked = made_up.header("x-request-id").expect("a request id").to_owned();
    let lines = logged(house.apis[0].process.as_ref().expect("an API process"));
    assert!(
        lines.iter().any(|line| line["span"]["request_id"] == asked.as_str() && line["fields"]["message"] == "answered"),
        "no line of request {asked}"
    );
    let lines = logged(&house.workers[0]);
    let of_run =
        |line: &&Value| line["spans"].as_array().is_some_and(|spans| spans.iter().any(|span| span["run_id"] == run.as_str()));
    assert!(lines.iter().any(|line| of_run(&line)), "no line of run {run}");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_read_at_their_own_listener_only() {
    let database = TestDatabase::start().await;
    let url = database.url.clone();
    let settings = [("BOREALIS_METRICS_LISTEN", "127.0.0.1:0")];
    let house = House::open_with(database, std::slice::from_ref(&url), &[], set(&settings)).await;
    let api = metrics_of(house.apis[0].process.as_ref().expect("an API process")).await;
    let shown = scrape(api).await.text;
    assert!(shown.contains("borealis_http_requests_total"));

    let public = Actor::anonymous(&house.admin.base);
    for actor in [&public, &house.admin] {
        for path in ["/metrics", "/api/metrics"] {
            let answer = actor.get(path).await;
            assert_eq!(answer.status, 404, "{path}");
            assert!(!answer.text.contains("borealis_"), "{path}: {}", answer.text);
        }
    }
    let internal = client().get(format!("http://{}/metrics", house.apis[0].internal_addr())).send().await.expect("an answer");
    assert_eq!(internal.status(), 401, "who has not signed is told nothing");
    assert!(!internal.text().await.expect("a text").contains("borealis_"));

    // And nothing else is at theirs.
    for path in ["/", "/metrics/", "/api/sites", "/ready", "/health"] {
        assert_eq!(client().get(format!("http://{api}{path}")).send().await.expect("an answer").status(), 404, "{path}");
    }
    assert_eq!(client().post(format!("http://{api}/metrics")).send().await.expect("an answer").status(), 405);
}

/// A worker whose way to the database is `url`, with its metrics.
async fn test_worker(processes: &mut Processes, url: &url::Url) -> (Child, SocketAddr) {
    let port = free_port();
    processes.set("DATABASE_URL", url.as_str()).set("BOREALIS_METRICS_LISTEN", format!("127.0.0.1:{port}"));
    let worker = processes.start("test-worker", &[]);
    let addr = SocketAddr::from(([127, 0, 0, 1], port));
    eventually("the worker serves its metrics", SOON, async || tokio::net::TcpStream::connect(addr).await.ok()).await;
    (worker, addr)
}

async fn start_probe(database: &TestDatabase) {
    let mut tx = database.pool.begin().await.expect("a transaction");
    let _ = start(&mut tx, &probe::probe(), NewRun { input: json!({}), ..NewRun::default() }).await.expect("a start");
    tx.commit().await.expect("a commit");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_lease_is_counted_and_so_are_a_recovered_run_and_a_lost_worker() {
    let database = TestDatabase::start().await;
    probe::create_tables(&database.pool).await;
    let mut processes = Processes::new();
    // It sleeps between its effect and its commit, which is where it is frozen for longer than its lease.
    processes.set("FAILPOINTS", "after_effect:probe:call=1*sleep(2000)");
    let (mut zombie, zombie_metrics) = test_worker(&mut processes, &database.url).await;
    let before = scrape(zombie_metrics).await;
    start_probe(&database).await;
    let called = async |count: i64| {
        let calls: i64 = sqlx::query_scalar("SELECT coalesce(sum(calls), 0)::bigint FROM probe_calls")
            .fetch_one(&database.pool)
            .await
            .expect("calls");
        (calls >= count).then_some(())
    };
    eventually("the effect", SOON, async || called(1).await).await;
    zombie.stop();
    let losses = |scrape: &Scrape| scrape.sum("borealis_lease_losses_total", &[]);
    let lost =
        |scrape: &Scrape| scrape.value("borealis_steps_total", &[("outcome", "lost"), ("step", "call"), ("workflow", "probe")]);
    assert_eq!((losses(&before), lost(&before)), (0.0, 0.0), "{}", before.text);

    processes.set("FAILPOINTS", "");
    let (_heir, heir_metrics) = test_worker(&mut processes, &database.url).await;
    eventually("another worker takes over", SOON, async || called(2).await).await;
    let heir = eventually("it has counted that", SOON, async || {
        let heir = scrape(heir_metrics).await;
        (heir.value("borealis_runs_recovered_total", &[("fate", "again")]) == 1.0).then_some(heir)
    })
    .await;
    assert_eq!(losses(&heir), 0.0, "the heir has lost nothing");

    zombie.resume();
    let after = eventually("the zombie counts its loss", SOON, async || {
        let after = scrape(zombie_metrics).await;
        (after.value("borealis_lease_losses_total", &[("noticed", "commit")]) == 1.0).then_some(after)
    })
    .await;
    assert_eq!(lost(&after), 1.0, "{}", after.text);
    let committed = after.value("borealis_steps_total", &[("outcome", "committed"), ("step", "call"), ("workflow", "probe")]);
    assert_eq!(committed, 0.0, "what was refused is not counted as committed");

    zombie.kill_now();
    eventually("the dead worker is missed", SOON, async || {
        let heir = scrape(heir_metrics).await;
        let workers = |state| heir.value("borealis_workers", &[("state", state)]);
        (workers("alive") == 1.0 && workers("lost") == 1.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_counted_and_a_database_in_trouble_is_told_of_and_not_asked_for_long() {
    let database = TestDatabase::start().await;
    let proxy = Proxy::start(&database.url).await;
    // A queue nobody works at.
    sqlx::raw_sql(
        "INSERT INTO workflow_runs (id, workflow, version, step, input, ready_at)
             SELECT gen_random_uuid(), 'nobodys', 3, 'first', '{}', now() - interval '1 hour' FROM generate_series(1, 1234);
         INSERT INTO workflow_runs (id, workflow, version, step, input, ready_at)
             SELECT gen_random_uuid(), 'nobodys', 3, 'first', '{}', now() + interval '1 hour' FROM generate_series(1, 100);
         INSERT INTO workflow_runs (id, workflow, version, step, input, state, finished_at)
             SELECT gen_random_uuid(), 'nobodys', 3, 'first', '{}', 'succeeded', now() FROM generate_series(1, 100);",
    )
    .execute(&database.pool)
    .await
    .expect("runs");
    let mut processes = Processes::new();
    let (_worker, metrics) = test_worker(&mut processes, &proxy.url(&database.url)).await;
    let waiting = scrape(metrics).await;
    assert_eq!(waiting.find("borealis_queue_ready_runs", &[("queue", "nobodys.v3")]), Some(1234.0), "{}", waiting.text);
    let age = waiting.value("borealis_queue_oldest_ready_seconds", &[("queue", "nobodys.v3")]);
    assert!((3_600.0..4_200.0).contains(&age), "{age} s");
    assert_eq!(waiting.find("borealis_queue_ready_runs", &[("queue", "scheduled_run.v1")]), Some(0.0));

    // What is held is told by who holds it, and by the tables.
    let mut tx = database.pool.begin().await.expect("a transaction");
    let _ = start(&mut tx, &probe::sleeper(), NewRun { input: json!({}), ..NewRun::default() }).await.expect("a start");
    tx.commit().await.expect("a commit");
    eventually("the sleeper is leased", SOON, async || {
        let held = scrape(metrics).await;
        (held.value("borealis_leases_held", &[]) == 1.0 && held.value("borealis_runs_leased", &[]) == 1.0).then_some(())
    })
    .await;

    // Asked a hundred times at once, the tables are looked at no more often: one look is five seconds after another.
    let looked = async || -> f64 {
        let sql = "SELECT extract(epoch FROM max(query_start))::float8 FROM pg_stat_activity
                   WHERE datname = current_database() AND query LIKE '%AS \"delivery!\"%' AND pid <> pg_backend_pid()";
        sqlx::query_scalar(sql).fetch_one(&database.pool).await.expect("when it was looked last")
    };
    let before = looked().await;
    futures::future::join_all((0..100).map(|_| scrape(metrics))).await;
    let passed = looked().await - before;
    assert!(passed == 0.0 || passed > 4.9, "looked again after {passed} s");

    // Somebody locks the table: the scrape is answered all the same, without what it cannot know.
    let mut lock = database.pool.begin().await.expect("a transaction");
    sqlx::raw_sql("LOCK TABLE workflow_runs IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await.expect("a lock");
    let locked = eventually("the lock is felt", SOON, async || {
        let locked = scrape(metrics).await;
        (locked.value("borealis_tables_failures_total", &[]) > 0.0).then_some(locked)
    })
    .await;
    assert_eq!(locked.find("borealis_queue_ready_runs", &[("queue", "nobodys.v3")]), None, "what is not known is not shown");
    assert_eq!(locked.value("borealis_postgres_up", &[]), 1.0, "it answered, with a refusal\n{}", locked.text);
    assert!(locked.value("borealis_tables_seconds", &[]) < 3.0);
    let left: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%schedulers!%'",
    )
    .fetch_one(&database.pool)
    .await
    .expect("a count");
    assert_eq!(left, 0, "a look that took too long was not ended");
    lock.rollback().await.expect("a rollback");
    eventually("all is known again", SOON, async || {
        let again = scrape(metrics).await;
        again.find("borealis_queue_ready_runs", &[("queue", "nobodys.v3")])
    })
    .await;

    proxy.go_away();
    let away = eventually("Postgres is missed", SOON, async || {
        let away = scrape(metrics).await;
        (away.find("borealis_postgres_up", &[]) == Some(0.0)).then_some(away)
    })
    .await;
    assert!(away.find("borealis_queue_ready_runs", &[("queue", "nobodys.v3")]).is_none());
    eventually("so do the worker's passes", SOON, async || {
        (scrape(metrics).await.value("borealis_pass_errors_total", &[("task", "recovery")]) > 0.0).then_some(())
    })
    .await;
    proxy.come_back();
    eventually("Postgres is back", SOON, async || {
        (scrape(metrics).await.value("borealis_postgres_up", &[]) == 1.0).then_some(())
    })
    .await;
}

/// What a collector was sent: a span and the name of the service it came from.
type Collected = Arc<Mutex<Vec<(String, Span)>>>;

/// A collector of OTLP over HTTP that takes protobuf with the header it was promised.
async fn collector() -> (SocketAddr, Collected) {
    async fn take(State(collected): State<Collected>, headers: HeaderMap, body: Bytes) -> Result<&'static str, &'static str> {
        if headers.get("content-type").is_none_or(|kind| kind != "application/x-protobuf") || headers["x-tenant"] != "lab" {
            return Err("not as agreed");
        }
        let sent = ExportTraceServiceRequest::decode(body).expect("spans in protobuf");
        for resource in sent.resource_spans {
            let service = text(&resource.resource.expect("a resource").attributes, "service.name").expect("a service");
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            collected.lock().expect("a lock").extend(spans.map(|span| (service.clone(), span)));
        }
        Ok("")
    }
    let collected = Collected::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let router = Router::new().route("/v1/traces", post(take)).with_state(collected.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (addr, collected)
}

fn text(attributes: &[KeyValue], name: &str) -> Option<String> {
    let found = attributes.iter().find(|attribute| attribute.key == name)?;
    match found.value.clone()?.value? {
        Any::StringValue(text) => Some(text),
        Any::IntValue(number) => Some(number.to_string()),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_steps_of_a_run_are_one_trace_with_the_runs_id_and_a_request_is_one_with_its_own() {
    let (addr, collected) = collector().await;
    let database = TestDatabase::start().await;
    let url = database.url.clone();
    let endpoint = format!("http://{addr}/");
    let settings = [
        ("BOREALIS_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "200"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=lab"),
    ];
    let mut house = House::open_with(database, std::slice::from_ref(&url), std::slice::from_ref(&url), set(&settings)).await;
    let script = house.script().await;
    let robot = house.robot(&[0]).await;
    let admin = house.admin.at(&house.admin.base);
    let job = house.run_now(&admin, &script, &[&robot]).await;
    house.all_are(job, "Success", 1).await;
    house.workflows_end().await;
    let answer = admin.get("/api/sites").await;
    let request = answer.header("x-request-id").expect("a request id").to_owned();
    let run: uuid::Uuid =
        sqlx::query_scalar("SELECT id FROM workflow_runs").fetch_one(&house.database.pool).await.expect("the run");

    let of_trace = |id: &[u8]| -> Vec<(String, Span)> {
        collected.lock().expect("a lock").iter().filter(|(_, span)| span.trace_id == id).cloned().collect()
    };
    let spans = eventually("the run's trace is whole", SOON, async || {
        let spans = of_trace(run.as_bytes());
        spans.iter().any(|(_, span)| span.parent_span_id.is_empty()).then_some(spans)
    })
    .await;
    let (service, root) = spans.iter().find(|(_, span)| span.parent_span_id.is_empty()).expect("a root");
    assert_eq!((service.as_str(), root.name.as_str()), ("borealis-worker", "scheduled_run"));
    assert_eq!(text(&root.attributes, "borealis.run_id"), Some(run.to_string()));
    assert_eq!(text(&root.attributes, "borealis.state").as_deref(), Some("succeeded"));
    let step = |name: &str| {
        let name = format!("scheduled_run/{name}");
        let mut found = spans.iter().filter(|(_, span)| span.name == name).map(|(_, span)| span);
        found.next().unwrap_or_else(|| panic!("no span of {name} in {spans:?}")).clone()
    };
    for name in ["resolve", "dispatch", "results", "finish"] {
        let span = step(name);
        assert_eq!(span.parent_span_id, root.span_id, "{name}");
        assert_eq!(text(&span.attributes, "borealis.run_id"), Some(run.to_string()), "{name}");
        assert_eq!(text(&span.attributes, "borealis.attempt").as_deref(), Some("1"), "{name}");
        assert!(root.start_time_unix_nano <= span.start_time_unix_nano + 5_000_000, "{name} began before its run");
        assert!(
            span.start_time_unix_nano <= span.end_time_unix_nano
                && span.end_time_unix_nano <= root.end_time_unix_nano + 1_000_000_000
        );
    }
    // What the step asked of the API is under the step, from the other process.
    let asked = eventually("the API's part of the trace", SOON, async || {
        of_trace(run.as_bytes()).into_iter().find(|(_, span)| span.kind == SpanKind::Server as i32)
    })
    .await;
    assert_eq!(asked.0, "borealis-api");
    assert_eq!(asked.1.name, "POST /api/internal/job-scheduler/host-service-event");
    assert_eq!(asked.1.parent_span_id, step("dispatch").span_id);
    assert_eq!(text(&asked.1.attributes, "http.response.status_code").as_deref(), Some("200"));

    let request = uuid::Uuid::parse_str(&request).expect("an id");
    let public = eventually("the request's trace", SOON, async || of_trace(request.as_bytes()).pop()).await.1;
    assert_eq!((public.name.as_str(), public.kind), ("GET /api/sites", SpanKind::Server as i32));
    assert!(public.parent_span_id.is_empty());
    let attribute = |name: &str| text(&public.attributes, name);
    assert_eq!(attribute("http.route").as_deref(), Some("/api/sites"));
    assert_eq!((attribute("url.path").as_deref(), attribute("url.scheme").as_deref()), (Some("/api/sites"), Some("http")));
    // A stranger cannot put requests into a trace of theirs.
    let forged = admin
        .request(reqwest::Method::GET, "/api/sites")
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let forged = admin.send(forged).await;
    let forged = uuid::Uuid::parse_str(forged.header("x-request-id").expect("a request id")).expect("an id");
    eventually("the other request's trace", SOON, async || of_trace(forged.as_bytes()).pop()).await;
    // Those who ask how the engine is are in no trace.
    let healthy = admin.get("/ready").await;
    let healthy = uuid::Uuid::parse_str(healthy.header("x-request-id").expect("a request id")).expect("an id");
    let last = admin.get("/api/sites").await;
    let last = uuid::Uuid::parse_str(last.header("x-request-id").expect("a request id")).expect("an id");
    eventually("the trace of a later request", SOON, async || of_trace(last.as_bytes()).pop()).await;
    assert!(of_trace(healthy.as_bytes()).is_empty());
    assert!(of_trace(&0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes()).is_empty());
}

#[tokio::test]
async fn up_gives_each_of_its_processes_the_port_that_was_set_for_it() {
    let folder = tempfile::Builder::new().prefix("borealis-metrics-").tempdir().expect("a folder");
    let (own, workers) = (free_port(), free_port());
    let mut processes = Processes::new();
    processes
        .set("BOREALIS_STATE_DIR", folder.path().join("state").display().to_string())
        .set("BOREALIS_LISTEN", format!("127.0.0.1:{}", free_port()))
        .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{}", free_port()))
        .set("BOREALIS_METRICS_LISTEN", format!("127.0.0.1:{own}"))
        .set("BOREALIS_WORKER_METRICS_LISTEN", format!("127.0.0.1:{own}"));
    let mut refused = processes.start("borealis-api", &["up"]);
    assert_eq!(refused.wait(SOON).await.code(), Some(1));
    let said = "BOREALIS_WORKER_METRICS_LISTEN: it must differ from BOREALIS_METRICS_LISTEN.";
    assert!(refused.output().contains(said), "{}", refused.output());

    // With the one only, the worker has none, and works.
    let program = async |port: u16, program: &str| {
        let shown = client().get(format!("http://127.0.0.1:{port}/metrics")).send().await.ok()?.text().await.ok()?;
        (Scrape::read(&shown).value("borealis_build_info", &[("program", program), ("version", "0.1.0")]) == 1.0).then_some(shown)
    };
    processes.set("BOREALIS_WORKER_METRICS_LISTEN", "");
    let up = processes.start("borealis-api", &["up"]);
    eventually("the worker works", SOON, async || {
        let shown = program(own, "borealis-api").await?;
        (Scrape::read(&shown).value("borealis_workers", &[("state", "alive")]) == 1.0).then_some(())
    })
    .await;
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", workers)).await.is_err());
    assert!(up.terminate().await.success());

    processes.set("BOREALIS_WORKER_METRICS_LISTEN", format!("127.0.0.1:{workers}"));
    let up = processes.start("borealis-api", &["up"]);
    eventually("the API's metrics", SOON, async || program(own, "borealis-api").await).await;
    eventually("the worker's metrics", SOON, async || program(workers, "borealis-worker").await).await;
    assert!(up.terminate().await.success());
}
