//! The layout of the crate: files do not import each other in a cycle, and rooms import only from
//! rooms below them. Imports are all paths that begin with `crate`, `super` or `self`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms, from the top down. A file imports only from its own room and from later ones.
const ROOMS: [&str; 15] = [
    "cli",
    "mount",
    "fuse",
    "tree",
    "store",
    "exports",
    "progress",
    "files",
    "guest",
    "archive",
    "disk",
    "event_log",
    "home",
    "process",
    "mountinfo",
];

/// The path of a module: `store/merge.rs` is `["store", "merge"]`.
type Module = Vec<String>;

/// The imports of each file: names by the module that contains them.
struct Imports(BTreeMap<Module, BTreeMap<Module, BTreeSet<String>>>);

impl Imports {
    fn of_crate() -> Imports {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut texts = BTreeMap::new();
        read_modules(&source, &source, &mut texts);
        let modules: BTreeSet<Module> = texts.keys().cloned().collect();
        let of_file = |(module, text): (&Module, &String)| {
            let mut taken: BTreeMap<Module, BTreeSet<String>> = BTreeMap::new();
            for path in paths_in(text, module) {
                if let Some((from, name)) = split(&path, &modules)
                    && !from.starts_with(module)
                    && !module.starts_with(&from)
                {
                    taken.entry(from).or_default().insert(name);
                }
            }
            (module.clone(), taken)
        };
        Imports(texts.iter().map(of_file).collect())
    }

    /// Returns an import cycle through `start`, if there is one.
    fn ring_from(&self, start: &Module) -> Option<Vec<Module>> {
        let mut ways = vec![vec![start.clone()]];
        let mut seen = BTreeSet::new();
        while let Some(way) = ways.pop() {
            let last = way.last()?;
            for next in self.0.get(last).into_iter().flat_map(BTreeMap::keys) {
                let mut longer = way.clone();
                longer.push(next.clone());
                if next == start {
                    return Some(longer);
                }
                if seen.insert(next.clone()) {
                    ways.push(longer);
                }
            }
        }
        None
    }

    /// Describes what one file imports from another.
    fn message(&self, from: &Module, to: &Module) -> String {
        let names = &self.0[from][to];
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (from, to) = (from.join("/"), to.join("/"));
        format!("src/{from} imports {} from src/{to}", names.join(", "))
    }
}

/// Reads every file below `dir` except tests.
fn read_modules(dir: &Path, source: &Path, texts: &mut BTreeMap<Module, String>) {
    let entries = fs::read_dir(dir).expect("a directory of the crate");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a name").path()).collect();
    paths.sort();
    for path in paths {
        let stem = path
            .file_stem()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        if stem == "tests" || stem == "main" {
            continue;
        }
        if path.is_dir() {
            read_modules(&path, source, texts);
            continue;
        }
        let place = dir.strip_prefix(source).expect("it is below");
        let mut module: Module = place
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        if stem != "mod" && stem != "lib" {
            module.push(stem);
        }
        let text = fs::read_to_string(&path).expect("a file of the crate");
        let text = text
            .split("#[cfg(test)]\nmod tests {")
            .next()
            .unwrap_or_default();
        let lines = text
            .lines()
            .map(|line| line.split("//").next().unwrap_or_default());
        texts.insert(module, lines.collect::<Vec<_>>().join("\n"));
    }
}

/// Returns every path in a file that begins with `crate`, `super` or `self`, relative to the
/// crate's root.
fn paths_in(text: &str, module: &Module) -> Vec<Module> {
    let mut paths = Vec::new();
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in text.match_indices(start) {
            let before = text[..at].chars().next_back();
            // Skip the middle of a name or path: `super::super::x` counts once, from its start.
            if before.is_some_and(|before| before.is_alphanumeric() || "_:".contains(before)) {
                continue;
            }
            let mut base = module.clone();
            let mut rest = &text[at..];
            while let Some(after) = rest.strip_prefix("super::") {
                base.pop();
                rest = after;
            }
            if let Some(after) = rest.strip_prefix("crate::") {
                base.clear();
                rest = after;
            }
            let rest = rest.strip_prefix("self::").unwrap_or(rest);
            expand(rest, &base, &mut paths);
        }
    }
    paths
}

/// Adds the path, or the braced list of paths, at the start of `text`. Returns the rest.
fn expand<'t>(text: &'t str, base: &Module, paths: &mut Vec<Module>) -> &'t str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = expand(rest, base, paths).trim_start();
            match rest.strip_prefix(',') {
                Some(after) => rest = after,
                None => return rest.strip_prefix('}').unwrap_or(rest),
            }
        }
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    let (name, rest) = text.split_at(end.unwrap_or(text.len()));
    if name.is_empty() {
        return rest;
    }
    let mut path = base.clone();
    if name != "self" {
        path.push(name.to_owned());
    }
    match rest.strip_prefix("::") {
        Some(rest) => expand(rest, &path, paths),
        None => {
            paths.push(path);
            rest
        }
    }
}

/// Splits a path into its module and the name that is imported from it.
fn split(path: &Module, modules: &BTreeSet<Module>) -> Option<(Module, String)> {
    let len = (1..=path.len())
        .rev()
        .find(|len| modules.contains(&path[..*len]))?;
    let name = path.get(len).cloned();
    Some((
        path[..len].to_vec(),
        name.unwrap_or_else(|| "all".to_owned()),
    ))
}

#[test]
fn files_do_not_import_each_other_in_a_cycle() {
    let imports = Imports::of_crate();
    assert!(imports.0.len() > 100, "{} files were read", imports.0.len());
    for module in imports.0.keys() {
        if let Some(ring) = imports.ring_from(module) {
            let steps = ring
                .windows(2)
                .map(|step| imports.message(&step[0], &step[1]));
            panic!("an import cycle:\n{}", steps.collect::<Vec<_>>().join("\n"));
        }
    }
}

#[test]
fn rooms_import_only_from_rooms_below_them() {
    let imports = Imports::of_crate();
    let rank = |module: &Module| {
        ROOMS
            .iter()
            .position(|room| Some(*room) == module.first().map(String::as_str))
    };
    let mut arrows = 0;
    for (from, taken) in &imports.0 {
        for to in taken.keys() {
            let (Some(above), Some(below)) = (rank(from), rank(to)) else {
                continue;
            };
            arrows += usize::from(above < below);
            assert!(above <= below, "{}", imports.message(from, to));
        }
    }
    assert!(arrows > 50, "{arrows} arrows between rooms were seen");
}

/// The rooms of the tree, from the top down.
const ROOMS_OF_TREE: [&str; 4] = ["changes", "reading", "staging", "nodes"];

#[test]
fn rooms_of_the_tree_import_only_from_rooms_below_them() {
    let imports = Imports::of_crate();
    let rank = |module: &Module| {
        let room = module.get(1).filter(|_| module[0] == "tree")?;
        ROOMS_OF_TREE.iter().position(|name| name == room)
    };
    let mut arrows = 0;
    for (from, taken) in &imports.0 {
        for to in taken.keys() {
            let (Some(above), Some(below)) = (rank(from), rank(to)) else {
                continue;
            };
            arrows += usize::from(above < below);
            assert!(above <= below, "{}", imports.message(from, to));
        }
    }
    assert!(arrows > 50, "{arrows} arrows between rooms were seen");
}

#[test]
fn imports_are_found_in_paths_and_use_lists() {
    let text = "use super::{Store, durable};\nuse crate::disk::{self, chain::{Chain, Run as R}};\n\
                fn f() -> super::super::guest::Map { super::merge::go() }";
    let module = ["store", "layers"].map(str::to_owned).to_vec();
    let paths = paths_in(text, &module);
    let paths: BTreeSet<String> = paths.iter().map(|path| path.join("::")).collect();
    let wanted = [
        "store::Store",
        "store::durable",
        "disk",
        "disk::chain::Chain",
        "disk::chain::Run",
        "guest::Map",
        "store::merge::go",
    ];
    for path in wanted {
        assert!(paths.contains(path), "{path} is not in {paths:?}");
    }
}
