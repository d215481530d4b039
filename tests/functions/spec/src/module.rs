// SPDX-License-Identifier: Apache-2.0
//! A test's module as a WASI command: its code as it is, `_start` beside it, and in the place of what the scripts'
//! host module `spectest` exports, the same defined by the module itself; so are functions of other modules that do
//! nothing but return a constant, which is what most tests of tables import.
//!
//! Only the numbers of functions change, by one: proc_exit comes first.
use std::collections::HashMap;

use wasm_encoder::reencode::{Error, Reencode};
use wasm_encoder::{
    CodeSection, ConstExpr, DataCountSection, DataSection, ElementSection, EntityType, ExportKind, ExportSection,
    Function, FunctionSection, GlobalSection, GlobalType, ImportSection, Instruction, MemorySection, MemoryType, Module,
    RefType, StartSection, TableSection, TableType, TypeSection, ValType,
};
use wasmparser::{ExternalKind, Operator, Parser, Payload, TypeRef};

pub const PROC_EXIT: u32 = 0;

/// What has to be known of a module to call it.
pub struct Shape {
    types: Vec<wasmparser::FuncType>,
    functions: Vec<u32>,
    pub globals: Vec<ValType>,
    /// Of memory, to begin with.
    pub pages: u64,
    exports: HashMap<String, (ExternalKind, u32)>,
    imports: Imports,
    /// Of each function, for who imports it: its body, when that names nothing of its module's.
    bodies: Vec<Option<Vec<u8>>>,
}

/// A body that somebody else's function has: of which module, by what name.
pub type Bodies<'a> = &'a dyn Fn(&str, &str) -> Option<Vec<u8>>;

/// No locals, and its end.
const NOTHING: [u8; 2] = [0, 0x0b];

#[derive(Default)]
struct Imports {
    functions: Vec<(u32, Vec<u8>)>,
    tables: u32,
    memories: u32,
    globals: Vec<Instruction<'static>>,
}

impl Shape {
    pub fn results(&self, function: u32) -> Vec<ValType> {
        let ty = &self.types[self.functions[function as usize] as usize];
        ty.results().iter().map(|ty| Renumbered { imports: &[] }.val_type(*ty).unwrap()).collect()
    }

    pub fn function(&self, name: &str) -> Option<u32> {
        self.export(name, ExternalKind::Func)
    }

    pub fn global(&self, name: &str) -> Option<u32> {
        self.export(name, ExternalKind::Global)
    }

    fn export(&self, name: &str, kind: ExternalKind) -> Option<u32> {
        self.exports.get(name).filter(|found| found.0 == kind).map(|found| found.1)
    }

    /// Or why there can be no command of it.
    pub fn of(bytes: &[u8], bodies: Bodies) -> Result<Shape, String> {
        let said = |error: wasmparser::BinaryReaderError| error.to_string();
        let mut shape = Shape {
            types: vec![],
            functions: vec![],
            globals: vec![],
            pages: 0,
            exports: HashMap::new(),
            imports: Imports::default(),
            bodies: vec![],
        };
        let encoder = |ty| Renumbered { imports: &[] }.val_type(ty).map_err(|error| error.to_string());
        for payload in Parser::new(0).parse_all(bytes) {
            match payload.map_err(said)? {
                Payload::TypeSection(section) => {
                    for ty in section.into_iter_err_on_gc_types() {
                        shape.types.push(ty.map_err(said)?);
                    }
                }
                Payload::ImportSection(section) => {
                    for import in section {
                        let import = import.map_err(said)?;
                        shape.import(import.module, import.name, import.ty, bodies)?;
                        if let TypeRef::Global(global) = import.ty {
                            shape.globals.push(encoder(global.content_type)?);
                        }
                    }
                    shape.functions = shape.imports.functions.iter().map(|import| import.0).collect();
                    shape.bodies = vec![None; shape.functions.len()];
                }
                Payload::FunctionSection(section) => {
                    for ty in section {
                        shape.functions.push(ty.map_err(said)?);
                    }
                }
                Payload::MemorySection(section) => {
                    for memory in section {
                        shape.pages += memory.map_err(said)?.initial;
                    }
                }
                Payload::GlobalSection(section) => {
                    for global in section {
                        shape.globals.push(encoder(global.map_err(said)?.ty.content_type)?);
                    }
                }
                Payload::ExportSection(section) => {
                    for export in section {
                        let export = export.map_err(said)?;
                        shape.exports.insert(export.name.into(), (export.kind, export.index));
                    }
                }
                Payload::CodeSectionEntry(body) => {
                    let mut operators = body.get_operators_reader().map_err(said)?.into_iter();
                    let plain = operators.all(|operator| matches!(operator, Ok(Operator::I32Const { .. } | Operator::End)));
                    shape.bodies.push(plain.then(|| body.as_bytes().to_vec()));
                }
                _ => (),
            }
        }
        Ok(shape)
    }

    /// Of an exported function, when it can be somebody else's.
    pub fn body(&self, name: &str) -> Option<Vec<u8>> {
        self.bodies.get(self.function(name)? as usize)?.clone()
    }

    /// spectest, as the specification's interpreter has it.
    fn import(&mut self, module: &str, name: &str, ty: TypeRef, bodies: Bodies) -> Result<(), String> {
        if let (TypeRef::Func(ty), Some(body)) = (ty, bodies(module, name)) {
            self.imports.functions.push((ty, body));
            return Ok(());
        }
        if module != "spectest" {
            return Err("imports another module: an invocation has one".into());
        }
        match (name, ty) {
            (_, TypeRef::Func(ty)) if name.starts_with("print") => {
                self.imports.functions.push((ty, NOTHING.into()));
            }
            ("table", TypeRef::Table(_)) => self.imports.tables += 1,
            ("memory", TypeRef::Memory(_)) => self.imports.memories += 1,
            ("global_i32", TypeRef::Global(_)) => self.imports.globals.push(Instruction::I32Const(666)),
            ("global_i64", TypeRef::Global(_)) => self.imports.globals.push(Instruction::I64Const(666)),
            ("global_f32", TypeRef::Global(_)) => {
                self.imports.globals.push(Instruction::F32Const(666.6_f32.into()));
            }
            ("global_f64", TypeRef::Global(_)) => {
                self.imports.globals.push(Instruction::F64Const(666.6_f64.into()));
            }
            _ => return Err(format!("imports spectest.{name}, which the harness has not")),
        }
        Ok(())
    }
}

/// The modules that one imports of, if it can be read so far.
pub fn imported(bytes: &[u8]) -> Vec<String> {
    let sections = Parser::new(0).parse_all(bytes).map_while(Result::ok);
    let imports = sections.filter_map(|payload| match payload {
        Payload::ImportSection(section) => Some(section.into_iter().map_while(Result::ok)),
        _ => None,
    });
    imports.flatten().map(|import| import.module.to_string()).collect()
}

struct Renumbered<'a> {
    imports: &'a [Instruction<'static>],
}

impl Reencode for Renumbered<'_> {
    type Error = std::convert::Infallible;

    fn function_index(&mut self, function: u32) -> Result<u32, Error<Self::Error>> {
        Ok(function + 1)
    }

    /// What was an imported global is not a constant any more: its value is.
    fn const_expr(&mut self, expression: wasmparser::ConstExpr) -> Result<ConstExpr, Error<Self::Error>> {
        let mut out = vec![];
        let mut operators = expression.get_operators_reader();
        while !operators.is_end_then_eof() {
            let operator = operators.read()?;
            out.push(match operator {
                Operator::GlobalGet { global_index } if (global_index as usize) < self.imports.len() => {
                    self.imports[global_index as usize].clone()
                }
                _ => self.instruction(operator)?,
            });
        }
        Ok(ConstExpr::extended(out))
    }
}

/// Sections in the order that they have to be in.
#[derive(Default)]
struct Sections {
    types: TypeSection,
    functions: FunctionSection,
    tables: TableSection,
    memories: MemorySection,
    globals: GlobalSection,
    exports: ExportSection,
    start: Option<u32>,
    elements: ElementSection,
    data_count: Option<u32>,
    code: CodeSection,
    data: DataSection,
}

impl Sections {
    fn bytes(self) -> Vec<u8> {
        let mut imports = ImportSection::new();
        let exit = EntityType::Function(self.types.len() - 2);
        imports.import("wasi_snapshot_preview1", "proc_exit", exit);
        let mut module = Module::new();
        module.section(&self.types).section(&imports).section(&self.functions);
        module.section(&self.tables).section(&self.memories).section(&self.globals).section(&self.exports);
        if let Some(function_index) = self.start {
            module.section(&StartSection { function_index });
        }
        module.section(&self.elements);
        if let Some(count) = self.data_count {
            module.section(&DataCountSection { count });
        }
        module.section(&self.code).section(&self.data);
        module.finish()
    }
}

/// The module with `driver` as its `_start`.
pub fn command(bytes: &[u8], shape: &Shape, driver: &Function) -> Result<Vec<u8>, String> {
    rewritten(bytes, shape, driver).map_err(|error| error.to_string())
}

fn rewritten(bytes: &[u8], shape: &Shape, driver: &Function) -> Result<Vec<u8>, Error<std::convert::Infallible>> {
    let mut re = Renumbered { imports: &shape.imports.globals };
    let mut out = Sections::default();
    for (ty, body) in &shape.imports.functions {
        out.functions.function(*ty);
        out.code.raw(body);
    }
    for _ in 0..shape.imports.tables {
        let element_type = RefType::FUNCREF;
        out.tables.table(TableType { element_type, table64: false, minimum: 10, maximum: Some(20), shared: false });
    }
    for _ in 0..shape.imports.memories {
        let maximum = Some(2);
        out.memories.memory(MemoryType { minimum: 1, maximum, memory64: false, shared: false, page_size_log2: None });
    }
    for (value, ty) in shape.imports.globals.iter().zip(&shape.globals) {
        let ty = GlobalType { val_type: *ty, mutable: false, shared: false };
        out.globals.global(ty, &ConstExpr::extended([value.clone()]));
    }
    for payload in Parser::new(0).parse_all(bytes) {
        match payload? {
            Payload::TypeSection(section) => re.parse_type_section(&mut out.types, section)?,
            Payload::FunctionSection(section) => re.parse_function_section(&mut out.functions, section)?,
            Payload::TableSection(section) => re.parse_table_section(&mut out.tables, section)?,
            Payload::MemorySection(section) => re.parse_memory_section(&mut out.memories, section)?,
            Payload::GlobalSection(section) => re.parse_global_section(&mut out.globals, section)?,
            Payload::ExportSection(section) => {
                for export in section {
                    let export = export?;
                    if export.name != "_start" {
                        re.parse_export(&mut out.exports, export)?;
                    }
                }
            }
            Payload::StartSection { func, .. } => out.start = Some(func + 1),
            Payload::ElementSection(section) => re.parse_element_section(&mut out.elements, section)?,
            Payload::DataCountSection { count, .. } => out.data_count = Some(count),
            Payload::CodeSectionEntry(body) => re.parse_function_body(&mut out.code, body)?,
            Payload::DataSection(section) => re.parse_data_section(&mut out.data, section)?,
            _ => (),
        }
    }
    out.types.ty().function([ValType::I32], []);
    out.types.ty().function([], []);
    out.functions.function(out.types.len() - 1);
    out.exports.export("_start", ExportKind::Func, out.functions.len());
    out.code.function(driver);
    Ok(out.bytes())
}
