-- A search that finds further groups of a person, for instance those that name their members by memberUid.
ALTER TABLE directory_providers ADD COLUMN group_search_filter text NOT NULL DEFAULT '';
