//! The chain over the audit: each event is bound to the one before it by a tag under a sub-key of Aegis. Who can write the
//! database but has no key can change nothing unnoticed, except cut off the end; a kept [`Report::head`] shows that too.
//!
//! A reset of Aegis takes the key. The chain goes on under the next one, which also says where its links begin; those before
//! cannot be checked any more.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    access::aegis::{Tagger, Vault},
    db,
    error::{Error, Kind, Result},
    scope::Actor,
};

/// What the tags are made for.
pub(crate) const PURPOSE: &str = "audit-chain";
/// The most events sealed in one transaction, and read at a time when they are checked.
pub const BATCH: i64 = 1_000;

/// One link.
fn text(before: &str, seq: i64, event: &str) -> String {
    format!("{before}\n{seq}\n{event}")
}

fn beginning(key_id: Uuid, from: i64) -> String {
    format!("begin\n{key_id}\n{from}")
}

/// Says, under a new data key, where its part of the chain begins.
///
/// # Errors
/// When the database is away.
pub(crate) async fn begin(tx: &mut db::Tx<'_>, tagger: &Tagger) -> Result<()> {
    let last = sqlx::query_scalar!(r#"SELECT coalesce(max(seq), 0) AS "last!" FROM audit_chain"#).fetch_one(&mut **tx).await?;
    let tag = tagger.tag(&beginning(tagger.key_id, last))?;
    sqlx::query!("UPDATE aegis SET chain_from = $1, chain_from_tag = $2", last, &tag).execute(&mut **tx).await?;
    Ok(())
}

/// Seals up to a thousand events that wait, and answers how many. None, while another process does it.
///
/// # Errors
/// 423 `aegis_locked`; 503 `aegis_busy`; when the database is away.
pub async fn seal(pool: &db::Pool, vault: &Vault) -> Result<usize> {
    if !sqlx::query_scalar!(r#"SELECT EXISTS (SELECT FROM audit_unsealed) AS "some!""#).fetch_one(pool).await? {
        return Ok(0);
    }
    let mut tx = pool.begin().await?;
    let ours = sqlx::query_scalar!(r#"SELECT pg_try_advisory_xact_lock(hashtext('borealis.audit_chain')) AS "ours!""#)
        .fetch_one(&mut *tx)
        .await?;
    if !ours {
        return Ok(0);
    }
    vault.fence(&mut tx).await?;
    let tagger = vault.tagger(PURPOSE)?;
    let last = sqlx::query!("SELECT seq, tag FROM audit_chain ORDER BY seq DESC LIMIT 1").fetch_optional(&mut *tx).await?;
    let (mut seq, mut before) = last.map_or((0, String::new()), |last| (last.seq, hex::encode(last.tag)));
    let events = sqlx::query!(
        r#"WITH due AS (
               DELETE FROM audit_unsealed u USING (SELECT event_id FROM audit_unsealed ORDER BY event_id LIMIT $1) d
               WHERE u.event_id = d.event_id RETURNING u.event_id
           )
           SELECT e.id, audit_text(e) AS "text!" FROM due JOIN audit_events e ON e.id = due.event_id ORDER BY e.id"#,
        BATCH,
    )
    .fetch_all(&mut *tx)
    .await?;
    let (mut seqs, mut ids, mut tags) = (Vec::new(), Vec::new(), Vec::new());
    for event in &events {
        seq += 1;
        let tag = tagger.tag(&text(&before, seq, &event.text))?;
        before = hex::encode(tag);
        seqs.push(seq);
        ids.push(event.id);
        tags.push(tag.to_vec());
    }
    sqlx::query!(
        "INSERT INTO audit_chain (seq, event_id, tag) SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bytea[])",
        &seqs,
        &ids,
        &tags,
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(events.len())
}

/// Where the chain is broken.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Break {
    /// The link, or none when it is an event outside of the chain.
    pub seq: Option<i64>,
    /// The event; none when it is no single one.
    pub event_id: Option<i64>,
    /// What is wrong, for a person.
    pub why: &'static str,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Links that were checked.
    pub checked: i64,
    /// Earlier links, made under a key that a reset took: they and their events are there, and nobody can say more.
    pub unverifiable: i64,
    /// Events that wait to be sealed.
    pub waiting: i64,
    /// The tag of the last link, in hex; empty without any. Kept elsewhere, it shows whether the end was cut off since.
    pub head: String,
    /// The first fault; none when all is well.
    pub broken: Option<Break>,
}

/// Checks the whole chain, a piece at a time.
///
/// # Errors
/// 423 `aegis_locked`; when the database is away.
pub async fn check(pool: &db::Pool, vault: &Vault) -> Result<Report> {
    let tagger = vault.tagger(PURPOSE)?;
    let mut conn = pool.acquire().await?;
    let key = sqlx::query!("SELECT key_id, chain_from, chain_from_tag FROM aegis").fetch_optional(&mut *conn).await?;
    let key = key
        .filter(|key| key.key_id == tagger.key_id)
        .ok_or_else(|| Error::new(Kind::Locked, "aegis_locked", "The secret store was reset; unlock it first."))?;
    let mut report = Report { checked: 0, unverifiable: key.chain_from, waiting: 0, head: String::new(), broken: None };
    let well_begun = match &key.chain_from_tag {
        Some(tag) => tagger.fits(&beginning(key.key_id, key.chain_from), tag),
        // Set up before there were resets.
        None => key.chain_from == 0,
    };
    if !well_begun {
        report.broken = Some(Break { seq: None, event_id: None, why: "the place where this key's links begin was changed" });
        return Ok(report);
    }
    let mut last = 0;
    loop {
        let links = sqlx::query!(
            r#"SELECT c.seq, c.event_id, c.tag, CASE WHEN e.id IS NOT NULL THEN audit_text(e) END AS "text?"
               FROM audit_chain c LEFT JOIN audit_events e ON e.id = c.event_id
               WHERE c.seq > $1 ORDER BY c.seq LIMIT $2"#,
            last,
            BATCH,
        )
        .fetch_all(&mut *conn)
        .await?;
        if links.is_empty() {
            break;
        }
        for link in links {
            let seq = last + 1;
            let fault = match &link.text {
                _ if link.seq != seq => Some("links before this one are missing"),
                None => Some("the event was removed"),
                Some(event) if seq > key.chain_from && !tagger.fits(&text(&report.head, seq, event), &link.tag) => {
                    Some("the event or its place was changed")
                }
                Some(_) => None,
            };
            if let Some(why) = fault {
                report.broken = Some(Break { seq: Some(link.seq), event_id: Some(link.event_id), why });
                return Ok(report);
            }
            last = seq;
            report.checked = (last - key.chain_from).max(0);
            report.head = hex::encode(&link.tag);
        }
    }
    if last < key.chain_from {
        report.broken = Some(Break { seq: Some(last + 1), event_id: None, why: "links of an earlier key are missing" });
        return Ok(report);
    }
    outside(&mut conn, &mut report).await?;
    Ok(report)
}

/// Checks the chain, and notes in the audit what was found.
///
/// # Errors
/// As [`check`].
pub async fn check_and_note(pool: &db::Pool, vault: &Vault) -> Result<Report> {
    let report = check(pool, vault).await?;
    let mut tx = pool.begin().await?;
    let actor = Actor::system();
    let entry = super::Entry {
        action: "audit.check",
        object_kind: "audit",
        failed: report.broken.is_some(),
        detail: serde_json::to_value(&report)?,
        ..super::Entry::default()
    };
    super::record(&mut tx, &actor, entry).await?;
    tx.commit().await?;
    Ok(report)
}

/// An event with its place in the chain.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Link {
    /// Its place: 1, 2, 3 and so on.
    pub seq: i64,
    /// Its tag, in hex: with the last one kept elsewhere, an end that was cut off shows.
    pub tag: String,
    /// The event.
    #[serde(flatten)]
    pub event: super::Event,
}

/// What the webhook has not been told yet, in order, up to `limit`. None while another transaction is at it.
///
/// # Errors
/// When the database is away.
pub async fn next_for_webhook(tx: &mut db::Tx<'_>, limit: i64) -> Result<Option<Vec<Link>>> {
    let told = sqlx::query_scalar!("SELECT seq FROM audit_webhook FOR UPDATE SKIP LOCKED").fetch_optional(&mut **tx).await?;
    let Some(told) = told else { return Ok(None) };
    let rows = sqlx::query!(
        r#"SELECT c.seq, encode(c.tag, 'hex') AS "tag!", e.id, e.at, e.actor_kind, e.actor_id, e.actor_name, e.ip, e.action, e.object_kind,
                  e.object_id, e.site_id, e.outcome, e.detail
           FROM audit_chain c JOIN audit_events e ON e.id = c.event_id WHERE c.seq > $1 ORDER BY c.seq LIMIT $2"#,
        told,
        limit
    )
    .fetch_all(&mut **tx)
    .await?;
    let links = rows.into_iter().map(|row| Link {
        seq: row.seq,
        tag: row.tag,
        event: super::Event {
            id: row.id,
            at: row.at,
            actor_kind: row.actor_kind,
            actor_id: row.actor_id,
            actor_name: row.actor_name,
            ip: row.ip,
            action: row.action,
            object_kind: row.object_kind,
            object_id: row.object_id,
            site_id: row.site_id,
            outcome: row.outcome,
            detail: row.detail,
        },
    });
    Ok(Some(links.collect()))
}

/// Notes that the webhook has been told of all up to this link.
///
/// # Errors
/// When the database is away.
pub async fn told_webhook(tx: &mut db::Tx<'_>, seq: i64) -> Result<()> {
    sqlx::query!("UPDATE audit_webhook SET seq = $1", seq).execute(&mut **tx).await?;
    Ok(())
}

/// How many sealed events the webhook has not been told yet.
///
/// # Errors
/// When the database is away.
pub async fn behind(pool: &db::Pool) -> Result<i64> {
    let behind = sqlx::query_scalar!(
        r#"SELECT coalesce((SELECT max(seq) FROM audit_chain), 0) - coalesce((SELECT seq FROM audit_webhook), 0) AS "behind!""#
    );
    Ok(behind.fetch_one(pool).await?)
}

/// Events that are neither in the chain nor on their way to it.
async fn outside(conn: &mut PgConnection, report: &mut Report) -> Result<()> {
    let found = sqlx::query!(
        r#"SELECT (SELECT count(*) FROM audit_unsealed) AS "waiting!",
                  (SELECT min(e.id) FROM audit_events e
                   WHERE NOT EXISTS (SELECT FROM audit_chain c WHERE c.event_id = e.id)
                     AND NOT EXISTS (SELECT FROM audit_unsealed u WHERE u.event_id = e.id)) AS stray,
                  (SELECT min(u.event_id) FROM audit_unsealed u
                   WHERE NOT EXISTS (SELECT FROM audit_events e WHERE e.id = u.event_id)) AS gone"#
    )
    .fetch_one(conn)
    .await?;
    report.waiting = found.waiting;
    let fault = |event_id, why| Break { seq: None, event_id: Some(event_id), why };
    report.broken = found
        .stray
        .map(|id| fault(id, "the event is not part of the chain"))
        .or_else(|| found.gone.map(|id| fault(id, "the event was removed")));
    Ok(())
}
