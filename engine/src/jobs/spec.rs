//! A job as an operator describes it, parsed and checked.

use chrono::{DateTime, Duration, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::schedule::{Expiration, MisfirePolicy, OverlapPolicy, Schedule, ScheduleInput, short};
use crate::{
    error::{Error, Result},
    names::{Name, Rule},
};

/// The longest name of a job, in characters.
pub const NAME_MAX: usize = 200;
/// The most components of one job.
pub const COMPONENTS_MAX: usize = 50;
/// The most targets of one job.
pub const TARGETS_MAX: usize = 10_000;
/// The most variable values of one component.
pub const VARIABLES_MAX: usize = 200;

/// The body of `POST /api/scheduled_jobs`, and of `PUT` with every field optional. Values are checked by [`JobSpec`], so
/// that each fault answers with the code of its field; unknown fields are refused here.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobBody {
    /// Text, 1 to [`NAME_MAX`] characters.
    pub name: Option<Value>,
    /// Objects, see [`Component`].
    pub components: Option<Value>,
    /// Objects and texts, see [`TargetInput`]; anything but a list is taken as a list of one.
    pub targets: Option<Value>,
    /// `automation`.
    pub job_kind: Option<Value>,
    /// The same.
    pub kind: Option<Value>,
    /// See [`ScheduleInput`].
    pub schedule: Option<Value>,
    /// `schedule.type`, flat.
    pub schedule_type: Option<Value>,
    /// `schedule.start`, flat.
    pub start: Option<Value>,
    /// `schedule.timezone`, flat.
    pub timezone: Option<Value>,
    /// `schedule.cron`, flat.
    pub cron: Option<Value>,
    /// `schedule.end`, flat.
    pub end: Option<Value>,
    /// `schedule.max_occurrences`, flat.
    pub max_occurrences: Option<Value>,
    /// `{stopAfterEnabled, expiration}`.
    pub duration: Option<Value>,
    /// Whether a run that takes too long is stopped.
    pub duration_stop_enabled: Option<Value>,
    /// How long a run may wait for its device.
    pub expiration: Option<Value>,
    /// How long a run may take.
    pub stop_after: Option<Value>,
    /// What happens to missed instants.
    pub misfire_policy: Option<Value>,
    /// What happens while an earlier occurrence has not ended.
    pub overlap_policy: Option<Value>,
    /// `system` or `current_user`.
    pub execution_context: Option<Value>,
    /// Not for scripts.
    pub credential_id: Option<Value>,
    /// Not for scripts.
    pub use_service_account: Option<Value>,
    /// Whether the schedule runs.
    pub enabled: Option<Value>,
}

/// Where the components of a job run; the whole set is a CHECK of `scheduled_jobs`, those of scripts are accepted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum ExecutionContext {
    /// As the machine's own account.
    #[default]
    System,
    /// In the sessions of signed-in users.
    CurrentUser,
}

impl ExecutionContext {
    /// The text stored and sent.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Reads the stored text.
    ///
    /// # Errors
    /// 400 `not_supported_yet` for contexts of playbooks, `invalid_execution_context` for any other text.
    pub fn parse(text: &str) -> Result<Self> {
        match text.trim() {
            "" | "system" => Ok(Self::System),
            "current_user" | "currentuser" => Ok(Self::CurrentUser),
            other @ ("local" | "ssh" | "winrm" | "ssh_individual" | "winrm_individual" | "onboarding_local_network") => {
                Err(not_supported("execution_context", &format!("the context {other}")))
            }
            other => Err(Error::field(
                "invalid_execution_context",
                "execution_context",
                format!("'{}' is not one of system, current_user", short(other)),
            )),
        }
    }
}

/// The longest name of a variable, in bytes.
pub const VARIABLE_NAME_MAX: usize = 200;
/// The longest description of a component, in characters.
pub const DESCRIPTION_MAX: usize = 4_000;

/// One thing a job runs: a script assembly with the values of its variables. The saved form is
/// `{kind: "script", assembly_guid, name, description, domain, domainLabel, variable_values}`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Component {
    /// `script`; `ansible`, `workflow` and `device_onboarding` have their place here.
    pub kind: String,
    /// The assembly. A job from before paths were resolved when it was saved may have none; it fails until one is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assembly_guid: Option<String>,
    /// In a request without a guid: the assembly's path. In a saved job: what could not be resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// What the operator calls it.
    #[serde(default)]
    pub name: String,
    /// What a client says of it; kept for the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The domain of the assembly, as a client saw it; kept for the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// What the client calls the domain; kept for the client.
    #[serde(default, rename = "domainLabel", skip_serializing_if = "Option::is_none")]
    pub domain_label: Option<String>,
    /// Values of the script's variables; they win over the document's defaults.
    #[serde(default)]
    pub variable_values: Map<String, Value>,
}

/// One entry of `targets` as written, not yet resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetInput {
    /// A device, by GUID or by hostname and optionally site.
    Device {
        /// Its GUID.
        guid: Option<Uuid>,
        /// Its hostname.
        hostname: Option<String>,
        /// The site it is said to be in; only used to tell namesakes apart, never trusted.
        site_id: Option<i64>,
    },
    /// Every device the job may reach.
    AllDevices {
        /// What the operator calls it.
        name: String,
    },
}

/// A job, checked except for what needs the database: whether targets exist in scope and assemblies exist.
#[derive(Debug, Clone)]
pub struct JobSpec {
    /// 1 to [`NAME_MAX`] characters.
    pub name: String,
    /// `automation`.
    pub job_kind: &'static str,
    /// At least one.
    pub components: Vec<Component>,
    /// When it is due.
    pub schedule: Schedule,
    /// What happens to missed instants.
    pub misfire_policy: MisfirePolicy,
    /// What happens while an earlier occurrence has not ended.
    pub overlap_policy: OverlapPolicy,
    /// Whether a run that takes too long is stopped.
    pub duration_stop_enabled: bool,
    /// How long a run may wait for its device.
    pub expiration: Expiration,
    /// How long a run may take, when it has its own limit; see [`stop_limit`].
    pub stop_after: Option<Expiration>,
    /// Where it runs.
    pub execution_context: ExecutionContext,
    /// Whether the schedule runs.
    pub enabled: bool,
}

impl JobSpec {
    /// Checks the body of a new job. Targets are read by [`targets`], before this, since scope comes first.
    ///
    /// # Errors
    /// 400 with the code of the field, in the order of the fields.
    pub fn parse(body: &JobBody, now: DateTime<Utc>) -> Result<Self> {
        let missing = || Error::invalid("name_and_components_required", "A job needs a name and components.");
        let job_kind = job_kind(body)?;
        let name = name(given(&body.name).ok_or_else(missing)?)?;
        let components = components(given(&body.components).ok_or_else(missing)?)?;
        if components.is_empty() {
            return Err(missing());
        }
        if given(&body.targets).is_none_or(|targets| targets.as_array().is_some_and(Vec::is_empty)) {
            return Err(targets_required());
        }
        credentials(body)?;
        let execution_context = context(body)?.unwrap_or_default();
        let schedule = Schedule::parse(&schedule_input(body)?.unwrap_or_default(), now)?;
        let limits = Limits::parse(body)?;
        Ok(Self {
            name,
            job_kind,
            components,
            misfire_policy: policy(&body.misfire_policy, "invalid_misfire_policy", "misfire_policy")?.unwrap_or_default(),
            overlap_policy: policy(&body.overlap_policy, "invalid_overlap_policy", "overlap_policy")?.unwrap_or_default(),
            duration_stop_enabled: limits.stop_enabled.unwrap_or(limits.stop_after.flatten().is_some()),
            expiration: limits.expiration.unwrap_or_else(|| schedule.default_expiration()),
            stop_after: limits.stop_after.flatten(),
            execution_context,
            enabled: flag(&body.enabled, "enabled")?.unwrap_or(true),
            schedule,
        })
    }

    /// Applies the body of an update to this job and checks the whole again. Answers whether the schedule was sent.
    ///
    /// # Errors
    /// 400 `no_fields_to_update`, else as [`JobSpec::parse`].
    pub fn update(&mut self, body: &JobBody, now: DateTime<Utc>) -> Result<bool> {
        if *body == JobBody::default() {
            return Err(Error::invalid("no_fields_to_update", "The body names no field to update."));
        }
        let missing = || Error::invalid("name_and_components_required", "A job needs a name and components.");
        if job_kind(body)? != self.job_kind {
            return Err(Error::field("invalid_job_kind", "job_kind", "cannot be changed"));
        }
        if let Some(value) = &body.name {
            self.name = name(value)?;
        }
        if let Some(value) = &body.components {
            self.components = components(value)?;
            if self.components.is_empty() {
                return Err(missing());
            }
        }
        if body.targets.as_ref().is_some_and(|targets| targets.is_null() || targets.as_array().is_some_and(Vec::is_empty)) {
            return Err(targets_required());
        }
        credentials(body)?;
        if let Some(context) = context(body)? {
            self.execution_context = context;
        }
        // An expiration that was only the default of the old schedule follows the new one.
        let defaulted = self.expiration == self.schedule.default_expiration();
        let input = schedule_input(body)?;
        let rescheduled = input.is_some();
        if let Some(input) = input {
            self.schedule = Schedule::parse(&input, now)?.keeping_wall_of(&self.schedule);
            if defaulted {
                self.expiration = self.schedule.default_expiration();
            }
        }
        let limits = Limits::parse(body)?;
        if let Some(expiration) = limits.expiration {
            self.expiration = expiration;
        }
        if let Some(stop_after) = limits.stop_after {
            self.stop_after = stop_after;
            self.duration_stop_enabled = stop_after.is_some();
        }
        if let Some(enabled) = limits.stop_enabled {
            self.duration_stop_enabled = enabled;
        }
        if let Some(policy) = policy(&body.misfire_policy, "invalid_misfire_policy", "misfire_policy")? {
            self.misfire_policy = policy;
        }
        if let Some(policy) = policy(&body.overlap_policy, "invalid_overlap_policy", "overlap_policy")? {
            self.overlap_policy = policy;
        }
        if let Some(enabled) = flag(&body.enabled, "enabled")? {
            self.enabled = enabled;
        }
        Ok(rescheduled)
    }
}

/// How long a run of a job may take; `None`: no limit. `stop_after`, else `expiration`, and only when stopping is on.
#[must_use]
pub fn stop_limit(duration_stop_enabled: bool, stop_after: Option<&str>, expiration: &str) -> Option<Duration> {
    let text = stop_after.unwrap_or(expiration);
    text.parse::<Expiration>().ok().filter(|_| duration_stop_enabled)?.duration()
}

/// The limits of a body; the outer `Option` is "was sent".
struct Limits {
    stop_enabled: Option<bool>,
    expiration: Option<Expiration>,
    stop_after: Option<Option<Expiration>>,
}

impl Limits {
    fn parse(body: &JobBody) -> Result<Self> {
        let (mut enabled, mut expiration) = (body.duration_stop_enabled.clone(), body.expiration.clone());
        match given(&body.duration) {
            None => {}
            Some(Value::Object(duration)) => {
                for (key, value) in duration {
                    match key.as_str() {
                        "stopAfterEnabled" | "stop_after_enabled" => agree(&mut enabled, value, "duration.stopAfterEnabled")?,
                        "expiration" => agree(&mut expiration, value, "duration.expiration")?,
                        other => return Err(unknown_field("duration", other)),
                    }
                }
            }
            Some(_) => return Err(Error::field("invalid_duration", "duration", "must be an object")),
        }
        let expiration = match given(&expiration) {
            None => None,
            Some(value) => Some(Expiration::parse(value, "invalid_expiration", "expiration")?),
        };
        let stop_after = match &body.stop_after {
            None => None,
            Some(Value::Null) => Some(None),
            Some(value) => {
                let limit = Expiration::parse(value, "invalid_stop_after", "stop_after")?;
                Some(Some(limit).filter(|limit| *limit != Expiration::Never))
            }
        };
        Ok(Self { stop_enabled: flag(&enabled, "duration_stop_enabled")?, expiration, stop_after })
    }
}

fn given(value: &Option<Value>) -> Option<&Value> {
    value.as_ref().filter(|value| !value.is_null())
}

fn not_supported(field: &str, what: &str) -> Error {
    Error::field("not_supported_yet", field, format!("{what} is not supported by this version"))
}

fn targets_required() -> Error {
    Error::field("targets_required", "targets", "a job needs at least one target")
}

fn unknown_field(place: &str, name: &str) -> Error {
    Error::field("unknown_field", &format!("{place}.{}", short(name)), "is not a field of this object")
}

/// Fills `slot` from the nested form; both forms may be sent when they say the same.
fn agree(slot: &mut Option<Value>, value: &Value, field: &str) -> Result<()> {
    if slot.as_ref().is_some_and(|flat| flat != value) {
        return Err(Error::field("conflicting_fields", field, "is sent in two forms that differ"));
    }
    *slot = Some(value.clone());
    Ok(())
}

fn flag(value: &Option<Value>, field: &str) -> Result<Option<bool>> {
    match given(value) {
        None => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(Value::Number(number)) if matches!(number.as_i64(), Some(0 | 1)) => Ok(Some(number.as_i64() == Some(1))),
        Some(_) => Err(Error::field("invalid_field", field, "must be true or false")),
    }
}

fn policy<P: std::str::FromStr<Err = Error>>(value: &Option<Value>, code: &'static str, field: &str) -> Result<Option<P>> {
    match given(value) {
        None => Ok(None),
        Some(Value::String(text)) => text.trim().parse().map(Some),
        Some(_) => Err(Error::field(code, field, "must be text")),
    }
}

fn job_kind(body: &JobBody) -> Result<&'static str> {
    let mut kind = body.job_kind.clone().filter(|kind| !kind.is_null());
    if let Some(value) = given(&body.kind) {
        agree(&mut kind, value, "kind")?;
    }
    match kind.as_ref().map(|kind| kind.as_str().map(|text| text.trim().to_ascii_lowercase())) {
        None => Ok("automation"),
        Some(Some(text)) => match text.as_str() {
            "automation" | "" => Ok("automation"),
            "onboarding" | "device_onboarding" | "automatic_onboarding" | "ssh_onboarding" | "patch_install" => {
                Err(not_supported("job_kind", &format!("the kind {text}")))
            }
            "agent_maintenance" => Err(Error::field("invalid_job_kind", "job_kind", "is made by agent maintenance only")),
            other => Err(Error::field("invalid_job_kind", "job_kind", format!("'{}' is not a kind of job", short(other)))),
        },
        Some(None) => Err(Error::field("invalid_job_kind", "job_kind", "must be text")),
    }
}

fn name(value: &Value) -> Result<String> {
    let text = value.as_str().ok_or_else(|| Error::field("invalid_name", "name", "must be text"))?.trim();
    if text.is_empty() {
        return Err(Error::invalid("name_and_components_required", "A job needs a name and components."));
    }
    Name::parse(text, &Rule { field: "name", code: "invalid_name", max_chars: NAME_MAX, in_paths: false }).map(Name::into_string)
}

fn credentials(body: &JobBody) -> Result<()> {
    if given(&body.credential_id).is_some() {
        return Err(not_supported("credential_id", "running scripts with a credential"));
    }
    if flag(&body.use_service_account, "use_service_account")? == Some(true) {
        return Err(not_supported("use_service_account", "running scripts with a service account"));
    }
    Ok(())
}

fn context(body: &JobBody) -> Result<Option<ExecutionContext>> {
    match given(&body.execution_context) {
        None => Ok(None),
        Some(Value::String(text)) => ExecutionContext::parse(text).map(Some),
        Some(_) => Err(Error::field("invalid_execution_context", "execution_context", "must be text")),
    }
}

/// The schedule of a body from both its forms; `None`: no part of it was sent.
///
/// # Errors
/// 400 `invalid_schedule`, `unknown_field`, `conflicting_fields`.
fn schedule_input(body: &JobBody) -> Result<Option<ScheduleInput>> {
    let flat = [&body.schedule_type, &body.start, &body.timezone, &body.cron, &body.end, &body.max_occurrences];
    let nested = match given(&body.schedule) {
        None if flat.iter().all(|value| value.is_none()) => return Ok(None),
        None => Map::new(),
        Some(Value::Object(nested)) => nested.clone(),
        Some(_) => return Err(Error::field("invalid_schedule", "schedule", "must be an object")),
    };
    let mut parts: [Option<Value>; 6] = flat.map(Clone::clone);
    for (key, value) in &nested {
        let index = match key.as_str() {
            "type" => 0,
            "start" => 1,
            "timezone" => 2,
            "cron" => 3,
            "end" => 4,
            "max_occurrences" => 5,
            other => return Err(unknown_field("schedule", other)),
        };
        if let Some(slot) = parts.get_mut(index) {
            agree(slot, value, &format!("schedule.{key}"))?;
        }
    }
    let [kind, start, timezone, cron, end, max_occurrences] = parts.map(Option::unwrap_or_default);
    Ok(Some(ScheduleInput { kind, start, timezone, cron, end, max_occurrences }))
}

/// The keys that say what a component is.
const DOMAIN_KEYS: [&str; 8] =
    ["kind", "type", "component_type", "assembly_type", "assemblyType", "assembly_subtype", "assemblySubtype", "script_type"];

/// Reads `components`.
///
/// # Errors
/// 400 `invalid_components`, `not_supported_yet`, `unknown_field`, with the index.
pub fn components(value: &Value) -> Result<Vec<Component>> {
    let items = value.as_array().ok_or_else(|| Error::field("invalid_components", "components", "must be a list"))?;
    if items.len() > COMPONENTS_MAX {
        return Err(Error::field("invalid_components", "components", format!("must be at most {COMPONENTS_MAX}")));
    }
    items.iter().enumerate().map(|(index, item)| component(&format!("components[{index}]"), item)).collect()
}

/// Text that is kept for a client and nothing else: at most `max` characters of it, without control characters.
fn note(text: &str, max: usize) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n').take(max).collect()
}

fn component(place: &str, item: &Value) -> Result<Component> {
    let fault = |field: &str, message: &str| Error::field("invalid_components", &format!("{place}{field}"), message);
    let item = item.as_object().ok_or_else(|| fault("", "must be an object"))?;
    let mut component = Component { kind: "script".into(), ..Component::default() };
    let mut names: [Option<&str>; 5] = [None; 5];
    let mut domain = "script";
    for (key, value) in item {
        if value.is_null() {
            continue;
        }
        let text = || value.as_str().map(str::trim).ok_or_else(|| fault(&format!(".{key}"), "must be text"));
        match key.as_str() {
            key if DOMAIN_KEYS.contains(&key) => {
                let text = text()?.to_ascii_lowercase();
                if text.contains("workflow") {
                    domain = "workflow";
                } else if domain != "workflow" && (text.contains("ansible") || text.contains("playbook")) {
                    domain = "ansible";
                } else if text.contains("onboarding") || text.contains("maintenance") {
                    return Err(not_supported(&format!("{place}.{key}"), "a component of this kind"));
                }
            }
            "assembly_guid" | "assemblyGuid" => component.assembly_guid = Some(text()?.to_lowercase()).filter(|s| !s.is_empty()),
            "path" | "script_path" => component.path = Some(text()?.to_owned()).filter(|s| !s.is_empty()),
            "description" => component.description = Some(note(text()?, DESCRIPTION_MAX)),
            "domain" => component.domain = Some(note(text()?, NAME_MAX)),
            "domainLabel" | "domain_label" => component.domain_label = Some(note(text()?, NAME_MAX)),
            "workflow_guid" => domain = "workflow",
            "playbook_path" => domain = "ansible",
            "name" => names[0] = Some(text()?),
            "component_name" => names[1] = Some(text()?),
            "displayName" => names[2] = Some(text()?),
            "display_name" => names[3] = Some(text()?),
            "script_name" => names[4] = Some(text()?),
            "variable_values" => {
                let values = value.as_object().ok_or_else(|| fault(".variable_values", "must be an object"))?;
                component.variable_values.extend(values.clone());
            }
            "variables" => {
                let list = value.as_array().ok_or_else(|| fault(".variables", "must be a list"))?;
                for variable in list {
                    let name = variable.get("name").and_then(Value::as_str);
                    let name = name.ok_or_else(|| fault(".variables", "must be objects with a name"))?;
                    let value = variable.get("value").cloned().unwrap_or_default();
                    component.variable_values.entry(name.to_owned()).or_insert(value);
                }
            }
            other => return Err(unknown_field(place, other)),
        }
    }
    if domain != "script" {
        return Err(not_supported(place, &format!("a component of kind {domain}")));
    }
    check_variables(&component.variable_values).map_err(|message| fault(".variable_values", &message))?;
    if component.assembly_guid.is_none() && component.path.is_none() {
        return Err(fault("", "needs an assembly_guid or a path"));
    }
    if component.path.as_deref().is_some_and(|path| path.split(['/', '\\']).any(|part| part == "..")) {
        return Err(fault(".path", "must not leave its folder"));
    }
    component.name =
        names.into_iter().flatten().find(|name| !name.is_empty()).unwrap_or_default().chars().take(NAME_MAX).collect();
    Ok(component)
}

/// The beginning of a text, for a message.
#[must_use]
pub fn shortened(text: &str) -> String {
    short(text)
}

/// Checks the values an operator gives to a script's variables: at most [`VARIABLES_MAX`], named, and no lists or objects.
///
/// # Errors
/// What is wrong, in words.
pub fn check_variables(values: &Map<String, Value>) -> Result<(), String> {
    if values.len() > VARIABLES_MAX {
        return Err(format!("must be at most {VARIABLES_MAX}"));
    }
    for (name, value) in values {
        if name.trim().is_empty() || name.len() > VARIABLE_NAME_MAX || name.chars().any(char::is_control) {
            return Err("names must be 1 to 200 characters without control characters".into());
        }
        if value.is_array() || value.is_object() {
            return Err(format!("'{}' must be text, a number, true, false or null", short(name)));
        }
        if value.as_str().is_some_and(|text| text.contains('\0')) {
            return Err(format!("'{}' contains a NUL character", short(name)));
        }
    }
    Ok(())
}

/// Reads `targets`.
///
/// # Errors
/// 400 `targets_required`, `invalid_target`, `not_supported_yet`, with the index.
pub fn targets(value: &Value) -> Result<Vec<TargetInput>> {
    let one = [value.clone()];
    let items = match value {
        Value::Array(items) => items.as_slice(),
        Value::Null => &[],
        _ => &one,
    };
    if items.is_empty() {
        return Err(targets_required());
    }
    if items.len() > TARGETS_MAX {
        return Err(Error::field("invalid_target", "targets", format!("must be at most {TARGETS_MAX}")));
    }
    items.iter().enumerate().map(|(index, item)| target(&format!("targets[{index}]"), item)).collect()
}

fn target(place: &str, item: &Value) -> Result<TargetInput> {
    let fault = |message: &str| Error::field("invalid_target", place, message);
    let hostname = |text: &str| {
        let text = text.trim();
        if text.is_empty() || text.len() > 253 || text.chars().any(char::is_control) {
            return Err(fault("is not a hostname"));
        }
        Ok(text.to_owned())
    };
    let item = match item {
        Value::String(text) => {
            let text = hostname(text)?;
            return Ok(match Uuid::parse_str(&text) {
                Ok(guid) => TargetInput::Device { guid: Some(guid), hostname: None, site_id: None },
                Err(_) => TargetInput::Device { guid: None, hostname: Some(text), site_id: None },
            });
        }
        Value::Number(number) => {
            return Ok(TargetInput::Device { guid: None, hostname: Some(number.to_string()), site_id: None });
        }
        Value::Object(item) => item,
        _ => return Err(fault("must be text or an object")),
    };
    let get = |key: &str| item.get(key).filter(|value| !value.is_null());
    let kind = match get("kind") {
        None => "",
        Some(value) => value.as_str().ok_or_else(|| fault("kind must be text"))?.trim(),
    };
    let allowed: &[&str] = match kind {
        "filter" => return Err(not_supported(place, "a filter as target")),
        "onboarding_scope" => return Err(not_supported(place, "an onboarding scope as target")),
        "all_devices" => &["kind", "name", "all_devices"],
        "" if get("all_devices") == Some(&Value::Bool(true)) => &["kind", "name", "all_devices"],
        "" if get("filter_id").is_some() || get("id").is_some() => return Err(not_supported(place, "a filter as target")),
        "device" | "" => &["kind", "hostname", "device_guid", "guid", "site_id", "site_name", "site"],
        other => return Err(fault(&format!("'{}' is not a kind of target", short(other)))),
    };
    if let Some(unknown) = item.keys().find(|key| !allowed.contains(&key.as_str())) {
        return Err(unknown_field(place, unknown));
    }
    if allowed.contains(&"all_devices") {
        let name = get("name").and_then(Value::as_str).unwrap_or("All devices");
        return Ok(TargetInput::AllDevices { name: name.chars().take(NAME_MAX).collect() });
    }
    let guid = match get("device_guid").or_else(|| get("guid")) {
        None => None,
        Some(Value::String(text)) if text.trim().is_empty() => None,
        Some(Value::String(text)) => Some(Uuid::parse_str(text.trim()).map_err(|_| fault("device_guid is not a GUID"))?),
        Some(_) => return Err(fault("device_guid must be text")),
    };
    let name = match get("hostname") {
        None => None,
        Some(Value::String(text)) => Some(hostname(text)?),
        Some(_) => return Err(fault("hostname must be text")),
    };
    let site_id = match get("site_id") {
        None => None,
        Some(value) => Some(
            value
                .as_i64()
                .or_else(|| value.as_str().and_then(|text| text.trim().parse().ok()))
                .filter(|id| *id > 0)
                .ok_or_else(|| fault("site_id must be a positive whole number"))?,
        ),
    };
    if guid.is_none() && name.is_none() {
        return Err(fault("needs a hostname or a device_guid"));
    }
    Ok(TargetInput::Device { guid, hostname: name, site_id })
}

/// The saved form of a target that is every device.
#[must_use]
pub fn saved_all_devices(name: &str) -> Value {
    json!({"kind": "all_devices", "name": name})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(value: Value) -> JobBody {
        serde_json::from_value(value).unwrap()
    }

    fn base() -> Value {
        json!({"name": "Nightly", "components": [{"assembly_guid": "ABC"}], "targets": ["host-a"]})
    }

    fn with(key: &str, value: Value) -> JobBody {
        let mut whole = base();
        whole[key] = value;
        body(whole)
    }

    fn now() -> DateTime<Utc> {
        "2026-06-01T10:00:30Z".parse().unwrap()
    }

    #[test]
    fn a_plain_job_has_the_defaults_of_the_contract() {
        let spec = JobSpec::parse(&body(base()), now()).unwrap();
        assert_eq!(spec.schedule.kind().as_str(), "immediately");
        assert_eq!((spec.misfire_policy, spec.overlap_policy), (MisfirePolicy::RunOnce, OverlapPolicy::Skip));
        assert_eq!((spec.expiration, spec.stop_after, spec.duration_stop_enabled), (Expiration::Never, None, false));
        assert_eq!((spec.execution_context, spec.enabled), (ExecutionContext::System, true));
        assert_eq!(spec.components[0].assembly_guid.as_deref(), Some("abc"), "guids are lower case");
        let daily = with("schedule", json!({"type": "daily", "start": 0}));
        assert_eq!(JobSpec::parse(&daily, now()).unwrap().expiration.to_string(), "1d", "one period");
    }

    #[test]
    fn both_forms_of_schedule_and_duration() {
        let mut flat = base();
        flat["schedule_type"] = json!("daily");
        flat["start"] = json!(3600);
        flat["timezone"] = json!("Europe/Berlin");
        let spec = JobSpec::parse(&body(flat.clone()), now()).unwrap();
        assert_eq!((spec.schedule.kind().as_str(), spec.schedule.timezone().name()), ("daily", "Europe/Berlin"));
        flat["schedule"] = json!({"type": "weekly"});
        assert_eq!(JobSpec::parse(&body(flat), now()).unwrap_err().code, "conflicting_fields");
        let spec = JobSpec::parse(&with("duration", json!({"stopAfterEnabled": true, "expiration": "2h"})), now()).unwrap();
        let limit = |spec: &JobSpec| {
            let stop_after = spec.stop_after.map(|s| s.to_string());
            stop_limit(spec.duration_stop_enabled, stop_after.as_deref(), &spec.expiration.to_string())
        };
        assert_eq!(limit(&spec), Some(Duration::hours(2)));
        let spec = JobSpec::parse(&with("stop_after", json!("5m")), now()).unwrap();
        assert_eq!((spec.duration_stop_enabled, limit(&spec)), (true, Some(Duration::minutes(5))));
        let spec = JobSpec::parse(&with("expiration", json!("5m")), now()).unwrap();
        assert_eq!(limit(&spec), None, "an expiry alone stops nothing");
    }

    #[test]
    fn faults_name_their_field() {
        for (key, value, code) in [
            ("name", json!(""), "name_and_components_required"),
            ("name", json!(null), "name_and_components_required"),
            ("name", json!(5), "invalid_name"),
            ("name", json!("x".repeat(201)), "invalid_name"),
            ("components", json!([]), "name_and_components_required"),
            ("components", json!({}), "invalid_components"),
            ("components", json!([{}]), "invalid_components"),
            ("components", json!(["abc"]), "invalid_components"),
            ("components", json!([{"assembly_guid": 5}]), "invalid_components"),
            ("components", json!([{"path": "Scripts/../x"}]), "invalid_components"),
            ("components", json!([{"assembly_guid": "a", "variable_values": {"a": []}}]), "invalid_components"),
            ("components", json!([{"assembly_guid": "a", "color": "red"}]), "unknown_field"),
            ("components", json!([{"assembly_guid": "a", "type": "ansible"}]), "not_supported_yet"),
            ("components", json!([{"assembly_guid": "a", "kind": "workflow"}]), "not_supported_yet"),
            ("components", json!([{"kind": "device_onboarding"}]), "not_supported_yet"),
            ("targets", json!([]), "targets_required"),
            ("job_kind", json!("chores"), "invalid_job_kind"),
            ("job_kind", json!("agent_maintenance"), "invalid_job_kind"),
            ("job_kind", json!("onboarding"), "not_supported_yet"),
            ("execution_context", json!("root"), "invalid_execution_context"),
            ("execution_context", json!("ssh"), "not_supported_yet"),
            ("credential_id", json!(3), "not_supported_yet"),
            ("use_service_account", json!(true), "not_supported_yet"),
            ("schedule", json!("daily"), "invalid_schedule"),
            ("schedule", json!({"type": "daily", "start": 0, "begin": 1}), "unknown_field"),
            ("schedule_type", json!("sometimes"), "invalid_schedule_type"),
            ("duration", json!(5), "invalid_duration"),
            ("duration", json!({"stop": true}), "unknown_field"),
            ("expiration", json!("soon"), "invalid_expiration"),
            ("stop_after", json!("soon"), "invalid_stop_after"),
            ("misfire_policy", json!("maybe"), "invalid_misfire_policy"),
            ("overlap_policy", json!(1), "invalid_overlap_policy"),
            ("enabled", json!("yes"), "invalid_field"),
        ] {
            assert_eq!(JobSpec::parse(&with(key, value.clone()), now()).unwrap_err().code, code, "{key}: {value}");
        }
        assert!(serde_json::from_value::<JobBody>(json!({"colour": 1})).is_err());
    }

    #[test]
    fn targets_are_read_with_their_index() {
        let guid = "0f0e0d0c-0b0a-0908-0706-050403020100";
        let read =
            targets(&json!(["host-a", guid, {"kind": "device", "hostname": "b", "site_id": 3}, {"all_devices": true}])).unwrap();
        assert_eq!(read.len(), 4);
        assert_eq!(read[1], TargetInput::Device { guid: Some(guid.parse().unwrap()), hostname: None, site_id: None });
        assert_eq!(targets(&json!("alone")).unwrap().len(), 1);
        for (value, code) in [
            (json!([]), "targets_required"),
            (json!(["ok", ""]), "invalid_target"),
            (json!(["ok", {}]), "invalid_target"),
            (json!(["ok", true]), "invalid_target"),
            (json!(["ok", {"kind": "device"}]), "invalid_target"),
            (json!(["ok", {"kind": "printer", "hostname": "x"}]), "invalid_target"),
            (json!(["ok", {"device_guid": "x"}]), "invalid_target"),
            (json!(["ok", {"hostname": "x", "site_id": -1}]), "invalid_target"),
            (json!(["ok", {"kind": "filter", "filter_id": 1}]), "not_supported_yet"),
            (json!(["ok", {"filter_id": 1}]), "not_supported_yet"),
            (json!(["ok", {"kind": "onboarding_scope", "site_id": 1}]), "not_supported_yet"),
        ] {
            let error = targets(&value).unwrap_err();
            assert_eq!(error.code, code, "{value}");
            assert!(code == "targets_required" || error.fields.keys().any(|field| field.starts_with("targets[1]")), "{error}");
        }
    }

    #[test]
    fn an_update_keeps_what_it_does_not_name() {
        let mut spec = JobSpec::parse(&with("schedule", json!({"type": "daily", "start": 0})), now()).unwrap();
        assert_eq!(spec.clone().update(&JobBody::default(), now()).unwrap_err().code, "no_fields_to_update");
        assert!(!spec.update(&body(json!({"name": "Other"})), now()).unwrap());
        assert_eq!((spec.name.as_str(), spec.schedule.kind().as_str()), ("Other", "daily"));
        assert_eq!(spec.clone().update(&body(json!({"schedule_type": "weekly"})), now()).unwrap_err().code, "start_required");
        assert!(spec.update(&body(json!({"schedule": {"type": "every_hour", "start": 0}})), now()).unwrap());
        assert_eq!(spec.expiration.to_string(), "1h", "the default follows the schedule");
        spec.update(&body(json!({"expiration": "3d"})), now()).unwrap();
        spec.update(&body(json!({"schedule": {"type": "every_5_minutes", "start": 0}})), now()).unwrap();
        assert_eq!(spec.expiration.to_string(), "3d", "a chosen one stays");
    }
}
