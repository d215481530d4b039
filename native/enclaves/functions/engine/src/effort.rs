// SPDX-License-Identifier: Apache-2.0
//! How much work it is to prepare a module, in bytes of one that does nothing unusual.
use wasmparser::{FunctionBody, Parser, Payload};

/// More parameters or results than this are unusual: every call and block may go through all of them.
const VALUES: usize = 16;

/// At most so much, but for a constant factor, is what wasmi does to translate the module: its length, and the locals
/// of each function, of which a few bytes declare 50,000.  u64::MAX where that cannot be said.
pub fn effort(module: &[u8]) -> u64 {
    measure(module).unwrap_or(u64::MAX)
}

fn measure(module: &[u8]) -> Option<u64> {
    let mut effort = module.len() as u64;
    for payload in Parser::new(0).parse_all(module) {
        match payload.ok()? {
            Payload::TypeSection(types) => {
                for ty in types.into_iter_err_on_gc_types() {
                    let ty = ty.ok()?;
                    if ty.params().len().max(ty.results().len()) > VALUES {
                        return None;
                    }
                }
            }
            Payload::CodeSectionEntry(body) => effort += locals(&body)?,
            _ => (),
        }
    }
    Some(effort)
}

fn locals(body: &FunctionBody<'_>) -> Option<u64> {
    let mut all = 0;
    for group in body.get_locals_reader().ok()? {
        all += u64::from(group.ok()?.0);
    }
    Some(all)
}
