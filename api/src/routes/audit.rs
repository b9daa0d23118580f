//! The audit: who did what, from where, and with what result.

use axum::{
    Json,
    body::Body,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use borealis_engine::{
    Error, Kind,
    audit::{self, Event, Filter, chain},
};
use chrono::{DateTime, SecondsFormat, Utc};
use futures::stream;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    access::{Operator, Permission, Routes},
    body::{self, Params},
    errors::Result,
    page::Limit,
    state::App,
};

/// Events of a page, unless the caller says how many.
const PAGE_DEFAULT: i64 = 50;
/// The most events of a page.
const PAGE_MAX: i64 = 200;
/// Events read at a time for an export.
const EXPORT_PAGE: i64 = 1_000;
/// The most events of one export.
const EXPORT_MAX: i64 = 1_000_000;
/// Exports and checks at a time of one API process; each reads much.
static LONG_READS: Semaphore = Semaphore::const_new(2);

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone()).operator(Permission::AuditRead, routes!(list)).operator(Permission::AuditRead, routes!(check))
}

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Not before this: RFC 3339, or epoch seconds.
    from: Option<String>,
    /// Before this: RFC 3339, or epoch seconds.
    to: Option<String>,
    /// By whom: a username or hostname, in any case.
    actor: Option<String>,
    /// What was done, or its beginning: `user.` is all that was done to users.
    action: Option<String>,
    /// What it was done to: `user`, `site`, `device`, `credential`, ...
    object_kind: Option<String>,
    /// The id of what it was done to.
    object_id: Option<String>,
    /// The site it belongs to.
    site_id: Option<i64>,
    /// `success` or `failure`.
    outcome: Option<String>,
    /// 1 to 200, by default 50. For an export 1 to 1,000,000, by default all of those.
    limit: Option<i64>,
    /// `next_cursor` of the page before.
    cursor: Option<i64>,
    /// `json` (the default) is a page; `jsonl` and `csv` are an export as a file.
    format: Option<String>,
}

/// An event.
#[derive(Debug, Serialize, ToSchema)]
struct AuditEvent {
    id: i64,
    /// RFC 3339.
    at: DateTime<Utc>,
    /// `anonymous`, `operator`, `device`, `worker` or `system`.
    actor_kind: String,
    /// The user id, device GUID or worker id.
    actor_id: String,
    /// The username or hostname.
    actor_name: String,
    /// The client's address.
    ip: String,
    /// As `noun.verb`.
    action: String,
    object_kind: String,
    object_id: String,
    site_id: Option<i64>,
    /// `success` or `failure`.
    outcome: String,
    /// Before and after, reasons. Never a secret.
    detail: Value,
}

impl From<Event> for AuditEvent {
    fn from(event: Event) -> Self {
        Self {
            id: event.id,
            at: event.at,
            actor_kind: event.actor_kind,
            actor_id: event.actor_id,
            actor_name: event.actor_name,
            ip: event.ip,
            action: event.action,
            object_kind: event.object_kind,
            object_id: event.object_id,
            site_id: event.site_id,
            outcome: event.outcome,
            detail: event.detail,
        }
    }
}

/// Events.
#[derive(Debug, Serialize, ToSchema)]
struct AuditEvents {
    /// The latest first.
    events: Vec<AuditEvent>,
    /// For the next page, when there is more.
    next_cursor: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Page,
    Lines,
    Csv,
}

fn format(text: Option<&str>) -> Result<Format> {
    match text {
        None | Some("json" | "") => Ok(Format::Page),
        Some("jsonl") => Ok(Format::Lines),
        Some("csv") => Ok(Format::Csv),
        Some(_) => Err(Error::field("invalid_format", "format", "must be json, jsonl or csv.").into()),
    }
}

impl Which {
    fn filter(&self) -> Result<Filter> {
        let given =
            |text: &Option<String>| text.as_ref().map(|text| text.trim().replace('\0', "")).filter(|text| !text.is_empty());
        let outcome = given(&self.outcome);
        if outcome.as_ref().is_some_and(|outcome| outcome != "success" && outcome != "failure") {
            return Err(Error::field("invalid_outcome", "outcome", "must be success or failure.").into());
        }
        Ok(Filter {
            from: body::instant(self.from.as_deref(), "from")?,
            to: body::instant(self.to.as_deref(), "to")?,
            actor: given(&self.actor),
            action: given(&self.action),
            object_kind: given(&self.object_kind),
            object_id: given(&self.object_id),
            site_id: self.site_id,
            outcome,
        })
    }
}

fn busy() -> Error {
    Error::new(Kind::Limited, "busy", "Other exports are running; try again.").retry_after(5)
}

/// Who did what: a page, the latest first, or an export as JSON lines or CSV. An export is an event too.
#[utoipa::path(get, path = "/api/audit", tag = "Audit", params(Which), responses(
    (status = 200, description = "A page; with `format=jsonl` or `csv` a file", body = AuditEvents),
    (status = 400, description = "`invalid_format`, `invalid_instant`, `invalid_outcome`, `invalid_limit`, `invalid_query`"),
    (status = 403, description = "`forbidden`"),
    (status = 429, description = "`busy`: two exports are running"),
))]
async fn list(State(app): State<App>, operator: Operator, Params(which): Params<Which>) -> Result<Response> {
    let (filter, format) = (which.filter()?, format(which.format.as_deref())?);
    if format != Format::Page {
        let limit = Limit::new(which.limit, EXPORT_MAX, EXPORT_MAX)?.rows();
        return export(&app, &operator, filter, which.cursor, limit, format).await;
    }
    let limit = Limit::new(which.limit, PAGE_DEFAULT, PAGE_MAX)?;
    let mut events = audit::page(&app.pool, &filter, which.cursor, limit.and_one()).await?;
    let next_cursor = limit.cut(&mut events).map(|last| last.id);
    Ok(Json(AuditEvents { events: events.into_iter().map(AuditEvent::from).collect(), next_cursor }).into_response())
}

async fn export(
    app: &App,
    operator: &Operator,
    filter: Filter,
    before: Option<i64>,
    limit: i64,
    format: Format,
) -> Result<Response> {
    let turn = LONG_READS.try_acquire().map_err(|_| busy())?;
    let (name, kind) = match format {
        Format::Csv => ("audit.csv", "text/csv; charset=utf-8"),
        _ => ("audit.jsonl", "application/jsonl; charset=utf-8"),
    };
    let entry = audit::Entry {
        action: "audit.export",
        object_kind: "audit",
        detail: json!({"file": name, "action": filter.action, "actor": filter.actor, "from": filter.from, "to": filter.to}),
        ..audit::Entry::default()
    };
    let mut tx = app.pool.begin().await.map_err(Error::from)?;
    audit::record(&mut tx, &operator.actor, entry).await?;
    tx.commit().await.map_err(Error::from)?;
    let app = app.clone();
    // One page is read when the client has taken the one before.
    let pages = stream::try_unfold((before, limit, true, turn), move |(before, left, first, turn)| {
        let (app, filter) = (app.clone(), filter.clone());
        async move {
            if left <= 0 {
                return Ok::<_, Error>(None);
            }
            let events = audit::page(&app.pool, &filter, before, left.min(EXPORT_PAGE)).await?;
            let Some(last) = events.last().map(|last| last.id) else {
                return Ok((first && format == Format::Csv).then(|| (csv_head(), (before, 0, false, turn))));
            };
            let left = left - i64::try_from(events.len()).unwrap_or(left);
            let text = match format {
                Format::Csv => csv_rows(&events, first)?,
                _ => lines(events)?,
            };
            Ok(Some((text, (Some(last), left, false, turn))))
        }
    });
    let headers = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\"")),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    Ok((headers, Body::from_stream(pages)).into_response())
}

fn lines(events: Vec<Event>) -> std::result::Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    for event in events {
        serde_json::to_writer(&mut text, &AuditEvent::from(event))?;
        text.push(b'\n');
    }
    Ok(text)
}

const COLUMNS: [&str; 12] = [
    "id",
    "at",
    "actor_kind",
    "actor_id",
    "actor_name",
    "ip",
    "action",
    "object_kind",
    "object_id",
    "site_id",
    "outcome",
    "detail",
];

/// A cell that no spreadsheet takes for a formula.
fn cell(text: &str) -> String {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r']) { format!("'{text}") } else { text.to_owned() }
}

fn csv_head() -> Vec<u8> {
    (COLUMNS.join(",") + "\n").into_bytes()
}

fn csv_rows(events: &[Event], first: bool) -> std::result::Result<Vec<u8>, Error> {
    let mut rows = csv::Writer::from_writer(if first { csv_head() } else { Vec::new() });
    for event in events {
        let site = event.site_id.map(|id| id.to_string()).unwrap_or_default();
        rows.write_record([
            event.id.to_string(),
            event.at.to_rfc3339_opts(SecondsFormat::Micros, true),
            event.actor_kind.clone(),
            cell(&event.actor_id),
            cell(&event.actor_name),
            event.ip.clone(),
            event.action.clone(),
            event.object_kind.clone(),
            cell(&event.object_id),
            site,
            event.outcome.clone(),
            event.detail.to_string(),
        ])
        .map_err(Error::bug)?;
    }
    rows.into_inner().map_err(|error| Error::bug(error.to_string()))
}

/// What a check of the audit found.
#[derive(Debug, Serialize, ToSchema)]
struct Checked {
    /// Whether nothing was changed or removed.
    ok: bool,
    /// Events that were checked.
    checked: i64,
    /// Earlier events, sealed under a key that a reset of the secret store took: they are there, and nobody can say more.
    unverifiable: i64,
    /// Events of the last moments that wait to be sealed.
    waiting: i64,
    /// The tag of the last event, in hex. Kept elsewhere, it shows later whether the end was cut off.
    head: String,
    /// The first fault: `seq`, `event_id` and `why`.
    #[schema(value_type = Option<Object>)]
    broken: Option<chain::Break>,
}

/// Check that nobody changed or removed an event. Reads the whole audit.
#[utoipa::path(get, path = "/api/audit/check", tag = "Audit", responses(
    (status = 200, body = Checked),
    (status = 403, description = "`forbidden`"),
    (status = 429, description = "`busy`: two exports are running"),
))]
async fn check(State(app): State<App>, _: Operator) -> Result<Json<Checked>> {
    let _turn = LONG_READS.try_acquire().map_err(|_| busy())?;
    let report = chain::check(&app.pool, &app.vault).await?;
    Ok(Json(Checked {
        ok: report.broken.is_none(),
        checked: report.checked,
        unverifiable: report.unverifiable,
        waiting: report.waiting,
        head: report.head,
        broken: report.broken,
    }))
}
