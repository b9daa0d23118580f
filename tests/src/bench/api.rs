//! `bench api`: the pages people look at, with 10,000 devices that report and thousands of jobs that have run.

use std::time::Duration;

use serde_json::Value;

use super::{
    Report,
    environment::{cpu_seconds, machine, tree_cpu_seconds},
    load, plain,
    stand::Stand,
    statements,
};
use crate::fleet::identity;

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Devices, all connected.
    #[arg(long, default_value_t = 10_000)]
    pub devices: usize,
    /// Jobs. Each has run five times on ten devices; every hundredth is for all devices and has run on all of them once.
    #[arg(long, default_value_t = 3_000)]
    pub jobs: usize,
    /// Requests a second.
    #[arg(long, default_value_t = 200.0)]
    pub rate: f64,
    /// Seconds of each load.
    #[arg(long, default_value_t = 15)]
    pub seconds: u64,
}

/// Runs the bench.
pub async fn run(options: &Options) -> Report {
    let mut report = Report::new("api", &machine());
    let mut stand = Stand::start().await;
    let (_empty, url) = plain::empty_route(&mut stand.environment.processes).await;
    let fleet = stand.fleet(options.devices).await;
    fill(&stand, options).await;
    let lasts = Duration::from_secs(options.seconds);

    let nothing = load::get(options.rate, lasts, None, |_| url.to_string()).await;
    report.figure("requests a second, planned ahead", options.rate, "/s");
    report.figure("reference: an empty axum route, p99", nothing.latencies.percentile(99.0), "ms");

    let pages = pages(&stand).await;
    let jobs = Page { name: "job list, 100 jobs", path: "/api/scheduled_jobs?limit=100".into() };
    let measured = [
        (true, Page { name: "device page, 100 devices", path: "/api/devices?slim=1&limit=100".into() }),
        (true, jobs),
        (false, Page { name: "device page, 20 devices with all documents", path: "/api/devices?limit=20".into() }),
        (false, Page { name: "one device", path: format!("/api/devices/{}", pages.device) }),
        (false, Page { name: "one device's history", path: format!("/api/device/activity/{}?limit=50", pages.device) }),
    ];
    for (is_goal, page) in measured {
        // Every request asks for another page, so that no answer is the same bytes again.
        let cursors = if page.path.contains("/api/devices?slim") { pages.device_cursors.as_slice() } else { &[] };
        let base = stand.installation.base.as_str().trim_end_matches('/').to_owned();
        let url = |number: usize| match cursors.get(number % cursors.len().max(1)) {
            Some(cursor) => format!("{base}{}&cursor={cursor}", page.path),
            None => format!("{base}{}", page.path),
        };
        let cpu = || (cpu_seconds(stand.installation.api.pid()), tree_cpu_seconds(stand.environment.cluster.pid()));
        statements::begin(&stand.database.pool).await;
        let before = cpu();
        let load = load::get(options.rate, lasts, Some(stand.token()), url).await;
        let after = cpu();
        statements::print(&stand.database.pool, page.name).await;
        let p99 = load.latencies.percentile(99.0);
        let name = page.name;
        if is_goal {
            report.at_most(50.0, format!("{name}, p99"), p99, "ms");
        } else {
            report.figure(format!("{name}, p99"), p99, "ms");
        }
        report.figure(format!("{name}, p50"), load.latencies.percentile(50.0), "ms");
        report.figure(format!("{name}, p99 to the empty route"), p99 / nothing.latencies.percentile(99.0), "x");
        let requests = load.latencies.count().max(1) as f64;
        report.figure(format!("{name}, mean size"), load.bytes as f64 / requests / 1024.0, "KiB");
        report.figure(format!("{name}, processor time of the API"), (after.0 - before.0) * 1e3 / requests, "ms");
        report.figure(format!("{name}, processor time of Postgres"), (after.1 - before.1) * 1e3 / requests, "ms");
        report.at_most(0.0, format!("{name}, failed"), load.failed as f64, "");
    }
    whole_list(&stand, lasts, &mut report).await;
    fleet.stop().await;
    report
}

/// Columns of a table of devices.
const COLUMNS: &str =
    "guid,hostname,status,site_name,operating_system,last_seen,internal_ip,external_ip,last_user,agent_build_id,connection_state";
/// How often a second a client reads the whole list.
const LISTS: f64 = 2.0;

/// All devices at once, as a console's table asks for them.
async fn whole_list(stand: &Stand, lasts: Duration, report: &mut Report) {
    let url = stand.installation.base.join(&format!("/api/devices?fields={COLUMNS}")).expect("a URL").to_string();
    let says = load::Says { bearer: Some(stand.token()), gzip: true };
    statements::begin(&stand.database.pool).await;
    let load = load::get(LISTS, lasts, says, |_| url.clone()).await;
    statements::print(&stand.database.pool, "the whole list").await;
    let name = "all devices, eleven columns, compressed";
    report.at_most(150.0, format!("{name}, p99"), load.latencies.percentile(99.0), "ms");
    report.figure(format!("{name}, p50"), load.latencies.percentile(50.0), "ms");
    report.at_most(400.0, format!("{name}, size"), load.bytes as f64 / load.latencies.count().max(1) as f64 / 1e3, "KB");
    report.at_most(0.0, format!("{name}, failed"), load.failed as f64, "");
}

/// A page people look at.
struct Page {
    name: &'static str,
    path: String,
}

/// Where the pages of the device list begin, and a device.
struct Pages {
    device_cursors: Vec<String>,
    device: String,
}

async fn pages(stand: &Stand) -> Pages {
    let mut pages = Pages { device_cursors: Vec::new(), device: String::new() };
    let mut cursor = String::new();
    loop {
        let page = stand.installation.admin.get(&format!("/api/devices?slim=1&limit=100{cursor}")).await.ok();
        page["devices"][0]["guid"].as_str().unwrap_or_default().clone_into(&mut pages.device);
        let Some(next) = page["next_cursor"].as_str() else { return pages };
        cursor = format!("&cursor={next}");
        pages.device_cursors.push(next.to_owned());
    }
}

/// What closing an occurrence notes of its results.
const CLOSED: &str = "UPDATE job_occurrences o SET results = g.results FROM (
     SELECT occurrence_id, jsonb_agg(to_jsonb(k) - 'occurrence_id') AS results FROM (
         SELECT occurrence_id, status, site_id, device_guid IS NULL AS nowhere, skip_reason = 'no_devices_targeted' AS without, count(*) AS runs
         FROM scheduled_job_runs GROUP BY 1, 2, 3, 4, 5) k GROUP BY 1) g WHERE g.occurrence_id = o.id";

/// Writes inventories, jobs and their history into the tables.
async fn fill(stand: &Stand, options: &Options) {
    let inventory = identity::inventory("machine");
    let document = |name: &str| inventory["details"][name].clone();
    let details = "INSERT INTO device_details (device_guid, summary, memory, network, software, storage, cpu)
                   SELECT guid, $1, $2, $3, $4, $5, $6 FROM devices
                   ON CONFLICT (device_guid) DO UPDATE SET summary = excluded.summary, memory = excluded.memory,
                       network = excluded.network, software = excluded.software, storage = excluded.storage, cpu = excluded.cpu";
    let mut query = sqlx::query(details);
    for name in ["summary", "memory", "network", "software", "storage", "cpu"] {
        query = query.bind(document(name));
    }
    query.execute(&stand.database.pool).await.expect("the inventories");
    let jobs = "INSERT INTO scheduled_jobs (name, components, targets, schedule_type, start_at, owner_user_id, enabled)
                SELECT 'Job ' || n, '[{\"kind\": \"script\", \"name\": \"A script\", \"assembly_guid\": \"a\"}]',
                       CASE WHEN n % 100 = 0 THEN '[{\"kind\": \"all_devices\", \"name\": \"All devices\"}]' ELSE
                       (SELECT jsonb_agg(jsonb_build_object('kind', 'device', 'device_guid', d.guid, 'hostname', d.hostname, 'site_id', d.site_id))
                        FROM (SELECT guid, hostname, site_id FROM devices ORDER BY guid OFFSET (n * 7) % $2 LIMIT 10) d) END,
                       'daily', now() - interval '10 days', (SELECT min(id) FROM users), false
                FROM generate_series(1, $1) n";
    let count = i32::try_from(options.jobs).expect("a number of jobs");
    let offsets = i32::try_from(options.devices.saturating_sub(10).max(1)).expect("a number of devices");
    sqlx::query(jobs).bind(count).bind(offsets).execute(&stand.database.pool).await.expect("the jobs");
    let history = [
        "INSERT INTO job_occurrences (job_id, scheduled_at, cause, state, frozen_at, finished_at)
         SELECT j.id, date_trunc('second', now()) - make_interval(days => n), 'schedule', 'closed', now(), now()
         FROM scheduled_jobs j, generate_series(1, CASE WHEN j.targets @> '[{\"kind\": \"all_devices\"}]' THEN 1 ELSE 5 END) n",
        "INSERT INTO scheduled_job_runs (job_id, occurrence_id, scheduled_at, status, device_guid, target_hostname, site_id,
                                         resolution_status, started_at, finished_at)
         SELECT o.job_id, o.id, o.scheduled_at, CASE WHEN random() < 0.9 THEN 'Success' ELSE 'Failed' END,
                d.guid, d.hostname, d.site_id, 'eligible', o.scheduled_at, o.scheduled_at
         FROM job_occurrences o JOIN scheduled_jobs j ON j.id = o.job_id, LATERAL (
             SELECT guid, hostname, site_id FROM devices WHERE j.targets @> '[{\"kind\": \"all_devices\"}]'
             UNION ALL
             SELECT (t ->> 'device_guid')::uuid, t ->> 'hostname', (t ->> 'site_id')::bigint
             FROM jsonb_array_elements(j.targets) t WHERE t ->> 'kind' = 'device') d",
        CLOSED,
        "INSERT INTO activity_history (device_guid, hostname, site_id, run_id, status, delivery, stdout, exit_code, request, finished_at)
         SELECT device_guid, target_hostname, site_id, id, status, 'done', repeat('a line of output' || E'\\n', 20), 0, '{}', finished_at
         FROM scheduled_job_runs",
    ];
    for statement in history {
        sqlx::query(statement).execute(&stand.database.pool).await.expect("the history");
    }
    let rows: i64 =
        sqlx::query_scalar("SELECT count(*) FROM activity_history").fetch_one(&stand.database.pool).await.expect("a count");
    eprintln!("  {} devices, {count} jobs, {rows} results in the tables", options.devices);
    stand.vacuum().await;
    let _: Value = stand.installation.admin.get("/api/scheduled_jobs?limit=1").await.ok();
}
