//! The layers that the disk states of a box consist of.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use crate::disk::chain_paths;
use crate::files::listing::resolve;
use crate::store::layers::graph::LayerGraph;

/// The layers of several backing chains, as resolved paths. Chains of one box share most of their
/// layers, so each layer is followed once.
#[derive(Default)]
pub struct Chains {
    /// The top layers of the chains that can be followed to their ends.
    pub tops: Vec<PathBuf>,
    /// What the headers of these chains name.
    pub named: BTreeSet<PathBuf>,
}

impl Chains {
    /// Follows the chains below these files. Leaves out a file that is not there, and a chain that
    /// can't be followed to its end.
    pub fn below(tops: Vec<PathBuf>, layers: &LayerGraph) -> Chains {
        let mut chains = Chains::default();
        let mut ends = HashMap::new();
        for top in tops {
            if layers.at(&top).is_none() && !top.is_file() {
                continue;
            }
            if let Some(named) = follow(layers, &top, &mut ends) {
                chains.named.extend(named);
                chains.tops.push(top);
            }
        }
        chains
    }

    /// Returns every layer once, top layers too.
    pub fn all(&self) -> impl Iterator<Item = &Path> {
        let tops = self.tops.iter().filter(|top| !self.named.contains(*top));
        tops.chain(&self.named).map(PathBuf::as_path)
    }
}

/// Follows the chain of a file, down to the first layer that was followed before. Returns the paths
/// that its headers name; None if it can't be followed to its end. `ends` says of each layer that
/// was followed whether its end was found.
fn follow(
    layers: &LayerGraph,
    top: &Path,
    ends: &mut HashMap<PathBuf, bool>,
) -> Option<Vec<PathBuf>> {
    let mut chain = vec![top.to_owned()];
    let mut has_end = None;
    while let Some(last) = chain.last() {
        has_end = ends.get(last).copied();
        let Some(file) = layers.at(last).filter(|_| has_end.is_none()) else {
            break;
        };
        match &file.backing {
            Some(backing) if chain.contains(backing) => has_end = Some(false),
            Some(backing) => {
                chain.push(backing.clone());
                continue;
            }
            None if file.damaged.is_some() => has_end = Some(false),
            None => {}
        }
        break;
    }
    let followed = chain.len();
    // The last one may be an image, which may have layers of its own.
    let has_end = has_end.unwrap_or_else(|| {
        let lowest = chain.last().and_then(|last| chain_paths(last).ok());
        let below = lowest.and_then(|paths| {
            let below = paths.iter().skip(1);
            below
                .map(|path| resolve(path).ok())
                .collect::<Option<Vec<_>>>()
        });
        let has_end = below.is_some();
        chain.extend(below.unwrap_or_default());
        has_end
    });
    let followed = chain.iter().take(followed).cloned();
    ends.extend(followed.map(|path| (path, has_end)));
    has_end.then(|| chain.split_off(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::layers::graph::{LayerGraph, made_of};

    fn chains(tops: &[&str], files: &[(&str, Option<&str>)]) -> (Vec<String>, Vec<String>) {
        let layers: LayerGraph = made_of(files);
        let chains = Chains::below(tops.iter().map(PathBuf::from).collect(), &layers);
        let text = |path: &Path| path.display().to_string();
        let tops = chains.tops.iter().map(|path| text(path)).collect();
        (tops, chains.named.iter().map(|path| text(path)).collect())
    }

    #[test]
    fn a_cycle_is_left_out_and_so_is_what_leads_to_it() {
        let files = [
            ("/one", Some("/two")),
            ("/two", Some("/one")),
            ("/three", Some("/two")),
        ];
        assert_eq!(chains(&["/one", "/three"], &files), (vec![], vec![]));
    }

    #[test]
    fn a_layer_that_is_missing_breaks_its_chains_alone() {
        let file = std::env::current_exe().unwrap();
        let whole = file.to_str().unwrap();
        let files = [
            ("/one", Some("/missing")),
            ("/two", Some("/one")),
            ("/three", Some(whole)),
        ];
        let (tops, named) = chains(&["/two", "/three", "/one"], &files);
        assert_eq!(tops, ["/three"]);
        assert_eq!(named, [whole]);
    }

    #[test]
    fn a_top_that_another_chain_names_is_named() {
        let file = std::env::current_exe().unwrap();
        let whole = file.to_str().unwrap();
        let files = [("/upper", Some("/lower")), ("/lower", Some(whole))];
        for tops in [["/upper", "/lower"], ["/lower", "/upper"]] {
            let (found, named) = chains(&tops, &files);
            assert_eq!(found, tops);
            let mut expected = ["/lower", whole];
            expected.sort_unstable();
            assert_eq!(named, expected);
        }
    }
}
