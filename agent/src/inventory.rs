//! What the machine is made of and what it is doing.

use std::sync::{Mutex, PoisonError};

use borealis_protocol::rest::Metrics;
use chrono::DateTime;
use serde_json::{Map, Value, json};
use sysinfo::{Disks, Networks, System};

/// The most disks and network interfaces reported of each.
const MAX_ITEMS: usize = 256;

/// Measures; the load is the mean since the call before.
pub(crate) struct Inventory {
    hostname: String,
    system: Mutex<Option<System>>,
}

impl Inventory {
    pub(crate) fn new(hostname: &str) -> Self {
        Self { hostname: hostname.to_owned(), system: Mutex::new(System::new().ok()) }
    }

    pub(crate) fn metrics(&self) -> Metrics {
        let mut metrics = Metrics {
            operating_system: operating_system(),
            last_reboot: last_reboot(),
            uptime: System::uptime().ok(),
            service_mode: Some("system".to_owned()),
            ..Metrics::default()
        };
        self.measure(|system| {
            metrics.cpu_percent = Some(round(f64::from(system.global_cpu_usage())));
            metrics.memory_percent = percent(system.used_memory(), system.total_memory());
        });
        metrics
    }

    /// First address that others can reach.
    pub(crate) fn internal_ip(&self) -> Option<String> {
        let networks = Networks::new_with_refreshed_list().ok()?;
        let mut found: Vec<_> = networks
            .iter()
            .flat_map(|(name, data)| data.ip_networks().iter().map(move |network| (name, network.addr)))
            .filter(|(_, address)| !address.is_loopback() && !address.is_unspecified())
            .filter(|(_, address)| !matches!(address, std::net::IpAddr::V6(v6) if v6.is_unicast_link_local()))
            .collect();
        found.sort_by_key(|(name, address)| (address.is_ipv6(), (*name).clone(), *address));
        found.first().map(|(_, address)| address.to_string())
    }

    /// The sections of a details report.
    pub(crate) fn details(&self) -> Map<String, Value> {
        let mut cpu = json!({});
        let mut memory = json!([]);
        self.measure(|system| {
            let name = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned()).unwrap_or_default();
            cpu = json!({
                "name": name,
                "physical_cores": System::physical_core_count().ok(),
                "logical_cores": system.cpus().len(),
                "base_clock_mhz": system.cpus().first().map(sysinfo::Cpu::frequency),
                "architecture": System::cpu_arch(),
            });
            memory = json!([{
                "slot": "System",
                "capacity": system.total_memory(),
                "used": system.used_memory(),
                "swap": system.total_swap(),
            }]);
        });
        let mut details = Map::new();
        details.insert("summary".to_owned(), self.summary());
        details.insert("cpu".to_owned(), cpu);
        details.insert("memory".to_owned(), memory);
        details.insert("storage".to_owned(), storage());
        details.insert("network".to_owned(), network());
        details
    }

    fn summary(&self) -> Value {
        let mut summary = Map::new();
        let mut put = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                summary.insert(key.to_owned(), value);
            }
        };
        put("hostname", Some(self.hostname.clone().into()));
        put("operating_system", operating_system().map(Value::from));
        put("kernel", System::kernel_version().ok().map(Value::from));
        put("last_reboot", last_reboot().map(Value::from));
        put("uptime_sec", System::uptime().ok().map(Value::from));
        put("internal_ip", self.internal_ip().map(Value::from));
        Value::Object(summary)
    }

    fn measure(&self, look: impl FnOnce(&System)) {
        let mut system = self.system.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(system) = system.as_mut() {
            system.refresh_memory();
            system.refresh_cpu_all();
            look(system);
        }
    }
}

fn operating_system() -> Option<String> {
    System::long_os_version().ok().or_else(|| System::name().ok())
}

fn last_reboot() -> Option<String> {
    let seconds = i64::try_from(System::boot_time().ok()?).ok()?;
    DateTime::from_timestamp(seconds, 0).map(|time| time.format("%Y-%m-%dT%H:%M:%SZ").to_string())
}

fn storage() -> Value {
    let Ok(disks) = Disks::new_with_refreshed_list() else { return json!([]) };
    let items = disks.iter().take(MAX_ITEMS).map(|disk| {
        let (total, free) = (disk.total_space(), disk.available_space());
        json!({
            "drive": disk.mount_point().to_string_lossy(),
            "disk_type": if disk.is_removable() { "Removable" } else { "Fixed" },
            "device": disk.name().to_string_lossy(),
            "file_system": disk.file_system().to_string_lossy(),
            "total": total,
            "used": total.saturating_sub(free),
            "free": free,
            "usage": percent(total.saturating_sub(free), total),
        })
    });
    Value::Array(items.collect())
}

fn network() -> Value {
    let Ok(networks) = Networks::new_with_refreshed_list() else { return json!([]) };
    let mut items: Vec<_> = networks.iter().collect();
    items.sort_by_key(|(name, _)| (*name).clone());
    let items = items.into_iter().take(MAX_ITEMS).map(|(name, data)| {
        let ips: Vec<_> = data.ip_networks().iter().map(|network| network.addr.to_string()).collect();
        json!({"adapter": name.to_string_lossy(), "ips": ips, "mac": data.mac_address().to_string()})
    });
    Value::Array(items.collect())
}

fn percent(part: u64, whole: u64) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
    (whole > 0).then(|| round(part as f64 * 100.0 / whole as f64))
}

/// One decimal.
fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_memory_and_an_operating_system() {
        let inventory = Inventory::new("HOST");
        let metrics = inventory.metrics();
        assert!(metrics.operating_system.is_some_and(|name| !name.is_empty()));
        assert!(metrics.memory_percent.is_some_and(|percent| percent > 0.0 && percent <= 100.0));
        let details = inventory.details();
        assert_eq!(details.get("summary").and_then(|s| s.get("hostname")), Some(&json!("HOST")));
        assert!(details.get("cpu").and_then(|c| c.get("logical_cores")).and_then(Value::as_u64).is_some_and(|cores| cores > 0));
    }
}
