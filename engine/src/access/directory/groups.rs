//! The groups of a person: those the entry names, the primary group, those that a search of the provider's finds, and the
//! groups of these groups. What cannot be looked up completely is an error, not a shorter list: a person would lose a role.

use std::collections::BTreeSet;

use ldap3::{Scope, ldap_escape};

use super::{
    ProviderType, dn,
    ldap::{Attributes, Connection, Person, fill, lookup_failed},
};
use crate::error::Result;

/// The most groups of one person that are looked at.
const GROUPS_MAX: usize = 5000;
/// How deep groups may be nested where the server does not resolve that by itself.
const DEPTH_MAX: usize = 10;
/// How many groups are asked about at once.
const GROUPS_AT_ONCE: usize = 50;
/// Matches an entry with the members of its members, however deep (Active Directory).
const IN_CHAIN: &str = "1.2.840.113556.1.4.1941";

/// The groups known of a person so far, each once.
struct Known {
    groups: Vec<String>,
    seen: BTreeSet<String>,
}

impl Known {
    /// Adds those that are new, and answers them.
    fn add(&mut self, groups: impl IntoIterator<Item = String>) -> Vec<String> {
        let new: Vec<String> = groups.into_iter().filter(|group| self.seen.insert(dn::normal(group))).collect();
        self.groups.extend(new.iter().cloned());
        new
    }
}

impl Connection<'_> {
    /// All groups of the person whose entry has these attributes, at most [`GROUPS_MAX`].
    ///
    /// # Errors
    /// 502 `directory_lookup_failed`.
    pub(super) async fn groups(&mut self, person: &Person, attributes: &Attributes<'_>) -> Result<Vec<String>> {
        let settings = self.settings;
        let mut known = Known { groups: Vec::new(), seen: BTreeSet::new() };
        known.add(person.groups.iter().cloned());
        if !settings.group_search_filter.is_empty() {
            let name = attributes.first(&settings.username_attribute).unwrap_or_default();
            let number = attributes.first("gidNumber").unwrap_or_default();
            let filter = fill(&settings.group_search_filter, &[("{dn}", &person.dn), ("{username}", &name), ("{gid}", &number)]);
            known.add(self.all_groups(&filter).await?);
        }
        if settings.provider_type == ProviderType::ActiveDirectory {
            let primary = self.primary_group(attributes).await?;
            known.add(primary.clone());
            if settings.nested_groups {
                let chain = |dn: &String| format!("(member:{IN_CHAIN}:={})", ldap_escape(dn.as_str()));
                let members: String = [&person.dn].into_iter().chain(&primary).map(chain).collect();
                known.add(self.all_groups(&format!("(&(objectClass=group)(|{members}))")).await?);
            } else if attributes.is_part(&settings.member_of_attribute) {
                let filter = format!("(&(objectClass=group)(member={}))", ldap_escape(person.dn.as_str()));
                known.add(self.all_groups(&filter).await?);
            }
        } else if settings.nested_groups {
            let mut next = known.groups.clone();
            let (direct, complete) = self.groups_with(std::slice::from_ref(&person.dn)).await?;
            // Where the server cuts this answer off, the groups that the entry itself names are enough.
            if !complete && person.groups.is_empty() {
                return Err(lookup_failed("the server's own limit was reached"));
            }
            next.extend(known.add(direct));
            for _ in 0..DEPTH_MAX {
                if next.is_empty() || known.groups.len() >= GROUPS_MAX {
                    break;
                }
                let parents = self.parents(&next).await?;
                next = known.add(parents);
            }
        }
        known.groups.truncate(GROUPS_MAX);
        Ok(known.groups)
    }

    fn group_base(&self) -> &str {
        let settings = self.settings;
        if settings.group_search_base_dn.is_empty() { &settings.base_dn } else { &settings.group_search_base_dn }
    }

    /// The names of the groups that fit, and whether these are all of them.
    async fn group_names(&mut self, filter: &str) -> Result<(Vec<String>, bool)> {
        let base = self.group_base().to_owned();
        let found = self.search(&base, Scope::Subtree, filter, &["1.1"], GROUPS_MAX, true).await?;
        Ok((found.entries.into_iter().map(|entry| entry.dn).collect(), found.complete))
    }

    async fn all_groups(&mut self, filter: &str) -> Result<Vec<String>> {
        let (names, complete) = self.group_names(filter).await?;
        if complete { Ok(names) } else { Err(lookup_failed("the server's own limit was reached")) }
    }

    /// The groups that have one of these as a member.
    async fn groups_with(&mut self, members: &[String]) -> Result<(Vec<String>, bool)> {
        let one = |member: &String| {
            let member = ldap_escape(member.as_str());
            format!("(member={member})(uniqueMember={member})")
        };
        let members: String = members.iter().map(one).collect();
        self.group_names(&format!("(|{members})")).await
    }

    /// The groups that these groups are in. An answer that the server cuts off is asked for again in smaller parts.
    async fn parents(&mut self, groups: &[String]) -> Result<Vec<String>> {
        let mut parents = Vec::new();
        let mut left: Vec<&[String]> = groups.chunks(GROUPS_AT_ONCE).collect();
        while let Some(some) = left.pop() {
            let (names, complete) = self.groups_with(some).await?;
            if complete {
                parents.extend(names);
            } else if some.len() > 1 {
                let (one, other) = some.split_at(some.len() / 2);
                left.extend([one, other]);
            } else {
                return Err(lookup_failed("the server's own limit was reached"));
            }
        }
        Ok(parents)
    }

    /// The group that Active Directory names by number only, and leaves out of the groups of the entry.
    async fn primary_group(&mut self, attributes: &Attributes<'_>) -> Result<Option<String>> {
        let number = attributes.first("primaryGroupID").and_then(|text| text.parse::<u32>().ok());
        let sid = attributes.bytes("objectSid");
        let Some(group) = sid.zip(number).and_then(|(sid, number)| sibling(&sid, number)) else { return Ok(None) };
        let found = self.search(&format!("<SID={group}>"), Scope::Base, "(objectClass=group)", &["1.1"], 1, false).await?;
        Ok(found.entries.into_iter().next().map(|entry| entry.dn))
    }
}

/// The security identifier of the same domain with this number, as text.
fn sibling(sid: &[u8], number: u32) -> Option<String> {
    let ([revision, count], rest) = sid.split_first_chunk::<2>()?;
    let (authority, parts) = rest.split_first_chunk::<6>()?;
    let (parts, []) = parts.as_chunks::<4>() else { return None };
    if parts.len() != usize::from(*count) {
        return None;
    }
    let authority = authority.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    let (_, domain) = parts.split_last()?;
    let mut text = format!("S-{revision}-{authority}");
    for part in domain.iter().map(|part| u32::from_le_bytes(*part)).chain([number]) {
        text += &format!("-{part}");
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::sibling;

    #[test]
    fn the_primary_group_is_of_the_same_domain() {
        let sid = hex::decode("010500000000000515000000a065cf7e784b9b5fe77c8770091c0100").expect("bytes");
        assert_eq!(sibling(&sid, 513).as_deref(), Some("S-1-5-21-2127521184-1604012920-1887927527-513"));
        assert_eq!(sibling(&sid[..20], 513), None);
        assert_eq!(sibling(&[], 513), None);
    }
}
