// rows_fields.h and similarity_fields.h say what launches are told, a line a field, in words that whoever includes them
// defines, and this undefines. Their structs are made by rows.h and similarity.h, their Python classes by bindings.cpp,
// and fusedloss/_C.pyi by tools/extension_stub.py.
#undef STRUCT  // STRUCT(name), END: around the fields of a struct
#undef END
#undef FIELD   // FIELD(type, name, value): where it is not given it is `value`, or else null or 0
#undef SIZE    // SIZE(type, name): a field that may not be negative
#undef LAUNCH  // LAUNCH(name, Args): the function that takes Args; of similarity_fields.h with a Strip and a Plan
