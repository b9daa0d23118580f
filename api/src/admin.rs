//! `borealis-api admin`: accounts, the secret store and the audit from the console of the engine's machine.
//!
//! Who may read the engine's database and state folder may do all of this anyway; here it is done right, and audited.

mod hold;

use std::{
    io::{BufRead, IsTerminal, Read, Write},
    path::PathBuf,
};

use borealis_engine::{
    Actor, Error, Kind, Result, Secret,
    access::{
        aegis::{self, Unseal, Vault},
        sessions, users,
    },
    audit::{self, chain},
    cluster::{self, DATABASE, Paths},
    db,
    keys::rotation::{Role, Rotation, State, What},
    time_zones,
};
use chrono::{DateTime, SecondsFormat, Utc};
use clap::{Args, Subcommand, ValueEnum};
use nix::{
    sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr},
    unistd::{Uid, User},
};
use serde::Serialize;
use serde_json::json;

use crate::{reconcilers::KEYS_EVERY, settings::Store};

/// The most connections to Postgres.
const POOL: u32 = 2;
/// The longest line that is read, in bytes.
const LINE_MAX_BYTES: usize = 4096;
/// Events read at a time for an export.
const EXPORT_PAGE: i64 = 1_000;
/// Exit status of who was interrupted.
const INTERRUPTED: i32 = 130;

/// What is asked for, and where it is.
#[derive(Debug, Args)]
pub struct Line {
    #[command(flatten)]
    store: Store,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Lists the users: role, where they come from, whether they can sign in, and when they last did.
    List,
    /// Gives an administrator a new password, printed once, and takes everything else they signed in with.
    ///
    /// At the sign-in they set up a second factor and choose a password of their own. Needs the secret store: where it does not open by
    /// itself, the cipher is asked for. If that is lost, there is only `force-reset`.
    Recover {
        /// The name to sign in with, in any case.
        username: String,
        /// Make a user without the Admin role an administrator.
        #[arg(long)]
        promote: bool,
    },
    /// Lists the live sessions of everybody, or of one user.
    Sessions {
        /// The name to sign in with, in any case.
        username: Option<String>,
    },
    /// Ends the sessions of a user, or of everybody.
    #[command(group(clap::ArgGroup::new("whose").required(true)))]
    EndSessions {
        /// The name to sign in with, in any case.
        #[arg(group = "whose")]
        username: Option<String>,
        /// Everybody's.
        #[arg(long, group = "whose")]
        all: bool,
    },
    /// Changes the cipher of the secret store. Nobody notices: what is sealed stays as it is.
    ///
    /// Both are asked for on the terminal, or read from standard input: the present one in the first line, the new one in the second.
    RotateCipher,
    /// Replaces a key in the state folder while everything runs.
    ///
    /// Makes a new key, waits until the processes on this machine accept it, uses it, and forgets the old one when nobody needs it any more. A
    /// rotation that was interrupted goes on where it stopped. With API processes on several machines: prepare on one and copy the files it
    /// names to the others, then switch on each, then finish on each.
    RotateKeys {
        /// Which key.
        #[arg(value_enum)]
        key: Rotatable,
        /// Do this step only.
        #[arg(long, value_enum, conflicts_with = "stolen")]
        step: Option<Step>,
        /// Make a new key whatever lies there, and do not accept any other one any longer. Agents that have a token of it get another one by themselves.
        #[arg(long)]
        stolen: bool,
    },
    /// Holds the engine: nothing is scheduled and nothing is dispatched until it is released. Agents stay connected.
    ///
    /// For the time before a backup is restored, or when jobs must not run. An engine that finds its database restored holds itself.
    Hold,
    /// Shows what would happen next, and releases the engine.
    Release {
        /// Skip what is due: missed instants leave a record and do not run. In a restored database, scripts that wait for their
        /// devices are not sent either.
        #[arg(long)]
        skip_missed: bool,
        /// Release it without a question.
        #[arg(long)]
        yes: bool,
    },
    /// Ends the secret store and everything sealed in it: for when its cipher is lost and nobody can sign in.
    ///
    /// Needs neither the cipher nor an account. Everybody is signed out and has neither password nor second factor; passkeys are removed;
    /// stored credentials lose their secrets, and jobs that use them are switched off. Agents go on working. Afterwards set up a new
    /// secret store and recover an administrator, as after the installation.
    ForceReset {
        /// Really.
        #[arg(long)]
        yes: bool,
    },
    /// Checks and exports the audit.
    #[command(subcommand)]
    Audit(AuditVerb),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Rotatable {
    /// What API processes and workers share.
    EngineSecret,
    /// What the access tokens of agents are signed with.
    AgentTokens,
    /// What scripts are signed with.
    ScriptSigning,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Step {
    /// Make the next key: it is accepted from now on.
    Prepare,
    /// Use it; the old one is still accepted.
    Switch,
    /// Forget the old one.
    Finish,
}

#[derive(Debug, Subcommand)]
enum AuditVerb {
    /// Checks that nobody changed or removed an event. The exit status is 1 when somebody did.
    Check,
    /// Prints all events as JSON lines, the latest first.
    Export,
}

struct Console {
    state_dir: PathBuf,
    secrets_dir: PathBuf,
    engine_secret_file: PathBuf,
    pool: db::Pool,
    unseal: Unseal,
    idle_s: u32,
    actor: Actor,
}

/// Does it.
///
/// # Errors
/// With a sentence for the person at the console.
pub async fn run(line: Line) -> Result<()> {
    time_zones::load(line.store.zoneinfo())?;
    let account = User::from_uid(Uid::effective()).ok().flatten();
    let account = account.map_or_else(|| Uid::effective().to_string(), |user| user.name);
    let console = Console {
        secrets_dir: line.store.state_dir()?.join("secrets"),
        state_dir: line.store.state_dir()?,
        engine_secret_file: line.store.engine_secret_file()?,
        pool: pool(&line.store).await?,
        unseal: line.store.unseal()?,
        idle_s: line.store.session_idle_seconds,
        actor: Actor::console(&account),
    };
    match line.verb {
        Verb::List => console.list().await,
        Verb::Recover { username, promote } => console.recover(&username, promote).await,
        Verb::Sessions { username } => console.sessions(username.as_deref()).await,
        Verb::EndSessions { username, .. } => console.end_sessions(username.as_deref()).await,
        Verb::RotateCipher => console.rotate_cipher().await,
        Verb::RotateKeys { key, step, stolen } => console.rotate_keys(key, step, stolen).await,
        Verb::Hold => console.hold().await,
        Verb::Release { skip_missed, yes } => console.release(skip_missed, yes).await,
        Verb::ForceReset { yes } => console.force_reset(yes).await,
        Verb::Audit(AuditVerb::Check) => console.audit_check().await,
        Verb::Audit(AuditVerb::Export) => console.audit_export().await,
    }
}

async fn pool(store: &Store) -> Result<db::Pool> {
    let url = match store.database_url() {
        Some(url) => url.to_owned(),
        None => {
            let state_dir = store.state_dir()?;
            cluster::find(&Paths::under(&state_dir), DATABASE).await?.ok_or_else(|| {
                let why = format!(
                    "No private Postgres runs in {}: start the engine with `up`, name its BOREALIS_STATE_DIR, or set DATABASE_URL.",
                    state_dir.display()
                );
                Error::new(Kind::Unavailable, "database_unavailable", why)
            })?
        }
    };
    db::check(&url).await?;
    let pool = db::connect(&db::Options { url, max_connections: POOL, application_name: "borealis admin".to_owned() })?;
    db::ready(&pool).await?;
    Ok(pool)
}

impl Console {
    async fn list(&self) -> Result<()> {
        let mut rows = vec![["USERNAME", "ROLE", "SOURCE", "STATE", "LAST SIGN-IN"].map(str::to_owned)];
        for user in users::list(&self.pool).await? {
            let state = match () {
                () if user.directory_disabled => "disabled",
                () if user.auth_reset_required => "to be recovered",
                () if user.password_change_required => "to choose a password",
                () => "ready",
            };
            let last = user.last_login.map_or_else(|| "never".to_owned(), instant);
            rows.push([user.username, user.role, user.auth_source, state.to_owned(), last]);
        }
        table(&rows)
    }

    async fn recover(&self, username: &str, promote: bool) -> Result<()> {
        let vault = self.vault().await?;
        let recovered = users::recover(&self.pool, &vault, &self.actor, username, promote).await;
        let password = recovered.map_err(|mut error| {
            match error.code {
                "not_an_admin" => error.message.push_str(" With --promote they become one."),
                "user not found" => error.message.push_str(" `borealis-api admin list` shows all."),
                _ => {}
            }
            error
        })?;
        say("Sign in with this password. You are asked to set up a second factor and then to choose a password of your own.");
        print(&format!("{}\n", password.expose()))
    }

    async fn sessions(&self, username: Option<&str>) -> Result<()> {
        let mut rows = vec![["USERNAME", "SIGNED IN", "LAST USED", "ENDS", "ADDRESS", "CLIENT"].map(str::to_owned)];
        let user_id = self.user_id(username).await?;
        for owned in sessions::list_all(&self.pool, user_id, self.idle_s).await? {
            let session = owned.session;
            let [created, seen, ends] = [session.created_at, session.last_seen_at, session.expires_at].map(instant);
            rows.push([owned.username, created, seen, ends, session.ip, session.user_agent]);
        }
        table(&rows)
    }

    async fn end_sessions(&self, username: Option<&str>) -> Result<()> {
        let user_id = self.user_id(username).await?;
        let ended = users::end_sessions(&self.pool, &self.actor, user_id).await?;
        say(&format!("{ended} ended."));
        Ok(())
    }

    async fn user_id(&self, username: Option<&str>) -> Result<Option<i64>> {
        match username {
            Some(username) => users::id_of(&self.pool, username).await.map(Some),
            None => Ok(None),
        }
    }

    async fn rotate_cipher(&self) -> Result<()> {
        let current = ask("Present cipher: ").await?;
        let new = ask("New cipher (at least 12 characters): ").await?;
        if std::io::stdin().is_terminal() && ask("New cipher, again: ").await?.expose() != new.expose() {
            return Err(Error::invalid("invalid_request", "The two differ; nothing was changed."));
        }
        let vault = Vault::new(Unseal::Manual);
        let mut tx = self.pool.begin().await?;
        vault.rotate(&mut tx, &current, &new, &self.actor).await?;
        tx.commit().await?;
        say("From the next unlock on the new cipher counts.");
        Ok(())
    }

    async fn rotate_keys(&self, key: Rotatable, step: Option<Step>, stolen: bool) -> Result<()> {
        let what = match key {
            Rotatable::EngineSecret => What::EngineSecret,
            Rotatable::AgentTokens => What::AgentTokens,
            Rotatable::ScriptSigning => What::ScriptSigning,
        };
        let rotation = Rotation::new(what, &self.secrets_dir, &self.engine_secret_file);
        let detail = json!({ "key": key, "step": step, "stolen": stolen });
        let mut tx = self.pool.begin().await?;
        let entry = audit::Entry { action: "keys.rotate", object_kind: "keys", detail, ..audit::Entry::default() };
        audit::record(&mut tx, &self.actor, entry).await?;
        tx.commit().await?;
        match step {
            Some(Step::Prepare) => rotation.prepare()?,
            Some(Step::Switch) => rotation.switch()?,
            Some(Step::Finish) => rotation.finish()?,
            None => return rotate_whole(&rotation, what, stolen).await,
        }
        say(match step {
            Some(Step::Prepare) => {
                "Copy this to every other machine with an API process, and wait ten seconds, before you switch."
            }
            Some(Step::Switch) => {
                "Switch on every other machine too, replace the copies of workers, and wait ten seconds, before you finish."
            }
            _ => "The old key does not count on this machine any more.",
        });
        let files = if step == Some(Step::Prepare) { rotation.to_copy() } else { vec![rotation.path(Role::Current)] };
        files.iter().try_for_each(|file| print(&format!("{}\n", file.display())))
    }

    async fn force_reset(&self, yes: bool) -> Result<()> {
        if !yes {
            let why = "This ends the secret store: nobody can sign in afterwards, and the secrets of stored credentials are lost. If that \
                       is what you want, add --yes.";
            return Err(Error::invalid("confirmation_required", why));
        }
        let taken = Vault::new(self.unseal.clone()).reset(&self.pool, &self.actor).await?;
        say(&format!(
            "The secret store is gone. Users to be recovered: {}, sessions ended: {}, passkeys removed: {}, credentials that lost secrets: \
             {}, jobs switched off: {}.",
            taken.users,
            taken.sessions.len(),
            taken.passkeys,
            taken.credentials.len(),
            taken.jobs.len(),
        ));
        say("Next: POST /api/bootstrap/aegis/setup, then /api/bootstrap/admin/recover and /api/bootstrap/admin/mfa/verify.");
        Ok(())
    }

    async fn audit_check(&self) -> Result<()> {
        let vault = self.vault().await?;
        let report = chain::check(&self.pool, &vault).await?;
        let checked = format!("{} events checked, {} of the last moments wait to be sealed.", report.checked, report.waiting);
        let earlier = match report.unverifiable {
            0 => String::new(),
            earlier => format!(" {earlier} earlier ones were sealed under a key that a reset took, and cannot be checked."),
        };
        match report.broken {
            None => print(&format!("ok: {checked}{earlier}\nhead: {}\n", report.head)),
            Some(broken) => {
                let event = broken.event_id.map(|id| format!(" at event {id}")).unwrap_or_default();
                let link = broken.seq.map(|seq| format!(" (link {seq})")).unwrap_or_default();
                let why = format!("The audit was tampered with{event}{link}: {}. {checked}{earlier}", broken.why);
                Err(Error::conflict("audit_broken", why))
            }
        }
    }

    async fn audit_export(&self) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        let detail = json!({ "file": "standard output" });
        let entry = audit::Entry { action: "audit.export", object_kind: "audit", detail, ..audit::Entry::default() };
        audit::record(&mut tx, &self.actor, entry).await?;
        tx.commit().await?;
        let mut before = None;
        loop {
            let events = audit::page(&self.pool, &audit::Filter::default(), before, EXPORT_PAGE).await?;
            let Some(last) = events.last() else { return Ok(()) };
            before = Some(last.id);
            let mut lines = String::new();
            for event in &events {
                lines.push_str(&serde_json::to_string(event)?);
                lines.push('\n');
            }
            print(&lines)?;
        }
    }

    /// The secret store, opened for this process alone: by itself if it can be, else with the cipher.
    async fn vault(&self) -> Result<Vault> {
        let vault = Vault::new(self.unseal.clone());
        if vault.follow(&self.pool).await? {
            return Ok(vault);
        }
        if aegis::updated_at(&self.pool).await?.is_none() {
            return Err(Error::conflict("not_configured", "There is no secret store yet: the engine has to be set up first."));
        }
        if vault.unseal().is_foreign() {
            match vault.settle(&self.pool).await {
                Ok(_) => return Ok(vault),
                Err(error) => say(&error.message),
            }
        }
        vault.open_with(&self.pool, &ask("Cipher of the secret store: ").await?).await?;
        Ok(vault)
    }
}

async fn rotate_whole(rotation: &Rotation, what: What, stolen: bool) -> Result<()> {
    let others_look = || tokio::time::sleep(KEYS_EVERY * 3);
    if stolen {
        // They lay in the same folder.
        rotation.discard()?;
    }
    let begun = rotation.state()?;
    if begun == State::Switched && what == What::AgentTokens && !stolen {
        return rotation.prepare();
    }
    if begun != State::Switched {
        rotation.prepare()?;
        say("The next key is there; waiting until it is accepted.");
        others_look().await;
        rotation.switch()?;
    }
    if what == What::AgentTokens && !stolen {
        say("The new key signs. The old one is accepted for another 20 minutes, until no agent can have a token of it.");
        return Ok(());
    }
    if !stolen {
        say("The new key is used; waiting until everybody does.");
        others_look().await;
    }
    rotation.finish()?;
    say("The old key does not count any more.");
    Ok(())
}

fn instant(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

fn say(text: &str) {
    eprintln!("borealis: {text}");
}

fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::bug)
}

/// Prints rows in columns; the first are their names.
fn table<const N: usize>(rows: &[[String; N]]) -> Result<()> {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    print(&text)
}

/// A line typed on the terminal, unseen, or the next one of standard input.
async fn ask(question: &str) -> Result<Secret<String>> {
    let hidden = Hidden::begin(question)?;
    let reading = tokio::task::spawn_blocking(|| {
        let mut line = String::with_capacity(LINE_MAX_BYTES);
        let read = std::io::stdin().lock().take(LINE_MAX_BYTES as u64).read_line(&mut line);
        (read, Secret::new(line))
    });
    let (read, line) = tokio::select! {
        read = reading => read.map_err(Error::bug)?,
        _ = tokio::signal::ctrl_c() => {
            // The thread that reads cannot be stopped.
            drop(hidden);
            std::process::exit(INTERRUPTED)
        }
    };
    if read.map_err(Error::bug)? == 0 {
        return Err(Error::invalid("nothing_typed", "A line is missing on standard input."));
    }
    Ok(Secret::new(line.expose().trim_end_matches(['\n', '\r']).to_owned()))
}

/// Keeps what is typed on a terminal from being shown.
struct Hidden(Option<nix::sys::termios::Termios>);

impl Hidden {
    fn begin(question: &str) -> Result<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self(None));
        }
        eprint!("{question}");
        let before = tcgetattr(&stdin).map_err(Error::bug)?;
        let mut silent = before.clone();
        silent.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(&stdin, SetArg::TCSAFLUSH, &silent).map_err(Error::bug)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            eprintln!();
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, before);
        }
    }
}
