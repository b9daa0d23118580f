//! Scripts ready to be sent: an assembly's document with the values of a run in place.
//!
//! Values an operator gives to a script's variables reach it through the process environment, never as program text.
//! Only booleans and numbers, whose text is of a fixed alphabet, are also written into PowerShell, where code expects
//! them as literals.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};
use sqlx::PgConnection;

use super::{
    FILES_SENT_MAX,
    document::{Script, Variable, VariableKind, literal},
};
use crate::{
    error::{Error, Kind, Result},
    jobs::spec,
    work,
};

/// What a reference to a variable begins with in PowerShell.
const MARK: &str = "$env:";

/// Where a script runs on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunMode {
    /// As the machine's own account.
    System,
    /// In every active session of a user.
    CurrentUser,
    /// In one session of a user.
    Session(i64),
}

impl RunMode {
    fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::CurrentUser | Self::Session(_) => "currentuser",
        }
    }
}

/// A script ready to be sent, but for its device, its ids and its signatures.
#[derive(Debug, Clone)]
pub struct ScriptRequest {
    /// The assembly's name.
    pub script_name: String,
    /// The assembly's path.
    pub script_path: String,
    /// One of [`super::SCRIPT_TYPES`].
    pub script_type: &'static str,
    /// The limit in seconds; 0: none.
    pub timeout_seconds: u32,
    /// The assembly as it was.
    pub content_hash: String,
    /// The assembly.
    pub assembly_guid: String,
    /// Its domain.
    pub assembly_source: String,
    /// `system` or `currentuser`.
    pub run_mode: &'static str,
    /// What all devices are sent alike: the payload of `quick_job_run` except `job_id`, `target_hostname`, `context`, signatures and key.
    pub request: Value,
    /// The length of the request as text, in bytes.
    pub bytes: i32,
}

pub(super) fn request(script_name: &str, script_path: &str, script: &Script, prepared: Prepared, mode: RunMode) -> Value {
    let mut request = json!({
        "script_type": script.script_type,
        "script_name": script_name,
        "script_path": script_path,
        "script_content": STANDARD.encode(&prepared.content),
        "script_encoding": "base64",
        "environment": prepared.environment,
        "variables": prepared.variables,
        "timeout_seconds": script.timeout_seconds,
        "files": prepared.files,
        "run_mode": mode.as_str(),
        "admin_user": "",
        "admin_pass": "",
        "target_context": mode.as_str(),
    });
    let session = match mode {
        RunMode::System => return request,
        RunMode::CurrentUser => None,
        RunMode::Session(id) => Some(id),
    };
    if let Some(request) = request.as_object_mut() {
        let target = if session.is_some() { "specific_session" } else { "all_active_sessions" };
        request.insert("session_target".into(), target.into());
        if let Some(id) = session {
            request.insert("target_session_id".into(), id.into());
        }
    }
    request
}

/// A script with its values in place.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// The text that is signed and run.
    pub content: String,
    /// What is added to the environment of its process.
    pub environment: BTreeMap<String, String>,
    /// `{name, label, type, value}` each.
    pub variables: Vec<Value>,
    /// `{file_name, size, mime_type, data?}` each.
    pub files: Vec<Value>,
}

/// Prepares a script for a run: reads its document, sets the values of its variables and writes the environment. Pure.
///
/// # Errors
/// 400 `invalid_variable_value` naming the variable.
pub fn prepare(script: &Script, values: &Map<String, Value>) -> Result<Prepared> {
    spec::check_variables(values).map_err(|reason| Error::field("invalid_variable_value", "variable_values", reason))?;
    let mut variables = script.variables.clone();
    for (name, value) in values {
        match variables.iter_mut().find(|variable| variable.name == *name) {
            Some(variable) => variable.value = value.clone(),
            None => variables.push(Variable {
                name: name.clone(),
                label: name.clone(),
                kind: VariableKind::String,
                value: value.clone(),
            }),
        }
    }
    let mut environment = BTreeMap::new();
    let mut literals: BTreeMap<String, (String, Option<String>)> = BTreeMap::new();
    let mut sent = Vec::new();
    for variable in &variables {
        let (text, literal) = literal(variable.kind, &variable.value)
            .map_err(|reason| Error::field("invalid_variable_value", &format!("variable_values.{}", variable.name), reason))?;
        let sanitised: String = variable.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let key = sanitised.to_ascii_uppercase();
        if is_identifier(&variable.name) {
            environment.insert(variable.name.clone(), text.clone());
        }
        environment.insert(sanitised, text.clone());
        environment.insert(key.clone(), text.clone());
        literals.insert(key.clone(), (key.clone(), literal.clone()));
        literals.insert(variable.name.to_ascii_uppercase(), (key, literal));
        sent.push(json!({"name": variable.name, "label": variable.label, "type": variable.kind.as_str(), "value": text}));
    }
    let content =
        if script.script_type == "powershell" { rewrite_powershell(&script.content, &literals) } else { script.content.clone() };
    Ok(Prepared { content, environment, variables: sent, files: sent_files(script.files.clone()) })
}

fn is_identifier(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_') && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Rewrites references `$env:NAME` and `$env:{NAME}` to variables of the script: booleans and numbers become literals, text
/// becomes the one form `${env:KEY}`, so that no value of an operator ever stands in the program text. A reference that is
/// assigned to, or escaped with a backtick, stays as it is. Linear in the length of the script.
fn rewrite_powershell(content: &str, literals: &BTreeMap<String, (String, Option<String>)>) -> String {
    let mut out = String::with_capacity(content.len());
    let mut rest = content;
    while let Some(at) = find_ignoring_case(rest, MARK) {
        let (before, from_mark) = rest.split_at(at);
        out.push_str(before);
        let after = from_mark.get(MARK.len()..).unwrap_or_default();
        let (name, length) = match braced(after) {
            Some(name) => (name, name.len() + 2),
            None => {
                let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                (after.get(..end).unwrap_or_default(), end)
            }
        };
        let tail = after.get(length..).unwrap_or_default();
        let known = Some(name)
            .filter(|name| name.len() <= spec::VARIABLE_NAME_MAX && !before.ends_with('`') && !is_assigned(tail))
            .and_then(|name| literals.get(&name.to_ascii_uppercase()));
        match known {
            Some((_, Some(literal))) => out.push_str(literal),
            Some((key, None)) => {
                out.push_str("${env:");
                out.push_str(key);
                out.push('}');
            }
            None => out.push_str(from_mark.get(..MARK.len() + length).unwrap_or_default()),
        }
        rest = tail;
    }
    out.push_str(rest);
    out
}

/// The name in `{NAME}` at the beginning of `text`. No name is longer than that of a variable, so a brace that is never closed is not
/// looked for to the end of the script.
fn braced(text: &str) -> Option<&str> {
    let inner = text.strip_prefix('{')?;
    let end = inner.bytes().take(spec::VARIABLE_NAME_MAX + 1).position(|byte| matches!(byte, b'}' | b'\n'))?;
    let (name, rest) = inner.split_at_checked(end)?;
    rest.starts_with('}').then_some(name)
}

fn find_ignoring_case(text: &str, mark: &str) -> Option<usize> {
    text.match_indices('$')
        .map(|(at, _)| at)
        .find(|at| text.get(*at..*at + mark.len()).is_some_and(|found| found.eq_ignore_ascii_case(mark)))
}

/// Whether what follows a reference assigns to it: `=`, `+=`, `-=`, `*=`, `/=`, `%=`, `++`, `--`.
fn is_assigned(tail: &str) -> bool {
    let tail = tail.trim_start_matches([' ', '\t']);
    let tail = tail.strip_prefix(['+', '-', '*', '/', '%']).map_or(tail, |rest| {
        if rest.starts_with(['+', '-']) {
            "="
        } else if rest.starts_with('=') {
            rest
        } else {
            ""
        }
    });
    tail.starts_with('=')
}

/// The files as they are sent.
fn sent_files(mut files: Vec<Value>) -> Vec<Value> {
    let size: usize = files.iter().filter_map(|file| file.get("data")?.as_str()).map(str::len).sum();
    if size > FILES_SENT_MAX {
        for file in files.iter_mut().filter_map(Value::as_object_mut) {
            file.remove("data");
        }
    }
    files
}

/// A script of an assembly as it was read from the database, not yet prepared.
#[derive(Debug, Clone)]
pub struct Source {
    /// The assembly.
    pub guid: String,
    /// Its hash.
    pub content_hash: String,
    domain: String,
    display_name: String,
    path: String,
    subtype: String,
    payload: String,
}

/// The script of an assembly as it is now, found by its guid and by nothing else.
///
/// # Errors
/// 404 `script_not_found`; 400 `unsupported_script_type`.
pub async fn source(conn: &mut PgConnection, guid: &str) -> Result<Source> {
    let row = sqlx::query!(
        "SELECT guid, domain, display_name, assembly_type, assembly_subtype, payload, content_hash, path FROM assemblies WHERE guid = $1",
        guid
    )
    .fetch_optional(conn)
    .await?
    .ok_or_else(|| Error::new(Kind::NotFound, "script_not_found", "Script not found: there is no such assembly."))?;
    if row.assembly_type != "script" {
        return Err(Error::invalid("unsupported_script_type", "The assembly is not a script."));
    }
    Ok(Source {
        guid: row.guid,
        content_hash: row.content_hash,
        domain: row.domain,
        display_name: row.display_name,
        path: row.path,
        subtype: row.assembly_subtype,
        payload: row.payload,
    })
}

impl Source {
    /// Reads the document and puts the values in place, on the pool for such work.
    ///
    /// # Errors
    /// 400 `invalid_payload`, `unsupported_script_type`, `invalid_variable_value`; 503 `busy`.
    pub async fn ready(self, values: Map<String, Value>, mode: RunMode) -> Result<ScriptRequest> {
        work::sized(self.payload.len(), move || {
            let script = Script::parse(&self.payload, &self.subtype)?;
            let prepared = prepare(&script, &values)?;
            let request = request(&self.display_name, &self.path, &script, prepared, mode);
            let bytes = i32::try_from(request.to_string().len()).unwrap_or(i32::MAX);
            Ok(ScriptRequest {
                script_name: self.display_name,
                script_path: self.path,
                script_type: script.script_type,
                timeout_seconds: script.timeout_seconds,
                content_hash: self.content_hash,
                assembly_guid: self.guid,
                assembly_source: self.domain,
                run_mode: mode.as_str(),
                request,
                bytes,
            })
        })
        .await?
    }
}
